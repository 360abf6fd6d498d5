"""Upstreams that do not exist yet: how the seams of NxDI may move, as edits of its sources.

A mutation rewrites sources as they are imported, of the double and of a real release alike.
Nothing is written to disk.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NXDI = "neuronx_distributed_inference"
NXD = "neuronx_distributed"
CONFIG = f"{NXDI}.models.config"
MODEL_WRAPPER = f"{NXDI}.models.model_wrapper"
APPLICATION = f"{NXDI}.models.application_base"
QWEN3_MOE = f"{NXDI}.models.qwen3_moe.modeling_qwen3_moe"
QUANTIZE = f"{NXD}.quantization.quantize"
QUANTIZED_LAYERS = f"{NXD}.quantization.quantization_layers"
CONVERTER = "convert_qwen3_moe_hf_to_neuron_state_dict"

EVERYWHERE = (NXDI, NXD, "tests.harness.running")
"""Upstream's packages, and the program that uses them."""


@dataclass(frozen=True)
class Mutation:
    """One way in which upstream may move.

    Attributes:
        name: What moves.
        seam: The seam that an error has to name; empty where the feature goes on working.
        renames: Words that have another name everywhere, also in the names of modules.
        edits: For a module, patterns and what takes their place; each has to be found.
        appended: For a module, what is written at its end.
        sources: For a module, the file that takes its place.
        late: Whether it shows only when the weights are there.
        native: Whether upstream has the feature, or a part of it, itself.
        ignored: Whether the flag never reaches us: NxDI says that it does not know it, and cannot
            load the model.
        scenarios: In which of the tests' scenarios it shows; none means all with quantized experts.
    """

    name: str
    seam: str = ""
    renames: Mapping[str, str] = field(default_factory=dict)
    edits: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    appended: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, Path] = field(default_factory=dict)
    late: bool = False
    native: bool = False
    ignored: bool = False
    scenarios: Sequence[str] = ()

    def apply(self) -> None:
        """Have the modules that are imported from now on rewritten, in this process."""
        sys.meta_path.insert(0, _Finder(self))

    def rewrite(self, module: str, source: str) -> str:
        """The source of a module as this upstream has it.

        Raises:
            LookupError: A pattern is not found: the mutation would test nothing.
        """
        if module in self.sources:
            source = self.sources[module].read_text(encoding="utf-8")
        for word, other in self.renames.items():
            # Not the module of the same name that transformers has.
            known = rf"(?<!transformers\.models\.qwen3_moe\.)\b{re.escape(word)}\b"
            source = re.sub(known, other, source)
        for pattern, replacement in self.edits.get(module, ()):
            source, found = re.subn(pattern, replacement, source)
            if not found:
                raise LookupError(f"{self.name}: {pattern!r} is not found in {module}")
        return source + "\n" + self.appended.get(module, "")

    def old_name(self, module: str) -> str | None:
        """The name by which a module is found on disk; None if it has another name now."""
        path = f".{module}."
        if any(f".{word}." in path for word in self.renames):
            return None
        for word, other in self.renames.items():
            path = path.replace(f".{other}.", f".{word}.")
        return path.strip(".")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds upstream's modules, with a loader that rewrites them."""

    def __init__(self, mutation: Mutation) -> None:
        self._mutation = mutation

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(EVERYWHERE):
            return None
        old = self._mutation.old_name(fullname)
        if old is None:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        spec = importlib.machinery.PathFinder.find_spec(old, path)  # type: ignore[arg-type]
        if spec is None or spec.origin is None:
            return spec
        loader = _Loader(fullname, spec.origin, self._mutation)
        return importlib.util.spec_from_file_location(fullname, spec.origin, loader=loader)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the rewritten source, past every cache."""

    def __init__(self, name: str, path: str, mutation: Mutation) -> None:
        super().__init__(name, path)
        self._mutation = mutation

    def get_code(self, fullname: str) -> types.CodeType:
        source = self._mutation.rewrite(fullname, Path(self.path).read_text(encoding="utf-8"))
        return compile(source, self.path, "exec", dont_inherit=True)


_NATIVE_CONFIG = """
_plain_init = MoENeuronConfig.__init__

def _init(self, *args, expert_wise_scale=False, **kwargs):
    self.expert_wise_scale = expert_wise_scale
    _plain_init(self, *args, **kwargs)

MoENeuronConfig.__init__ = _init
"""

_NATIVE_TWO_PASSES = """
_one_pass = convert

def convert(
    module, q_config=None, inplace=False, mapping=None, include=None, modules_to_not_convert=None
):
    settings = {"inplace": inplace, "mapping": mapping}
    skipped = list(modules_to_not_convert or [])
    asked = getattr(module.config.neuron_config, "expert_wise_scale", False)
    if include is not None or not asked:
        return _one_pass(
            module, q_config, include=include, modules_to_not_convert=skipped or None, **settings
        )
    _one_pass(module, q_config, modules_to_not_convert=[*skipped, "expert_mlps"], **settings)
    names = ("quantized_dtype", "activation_quantization_type", "clamp_bound")
    experts = get_default_expert_wise_per_channel_custom_qconfig_dict()
    experts.update({name: q_config[name] for name in names})
    return _one_pass(module, experts, include=["*expert_mlps.mlp_op*"], **settings)
"""

_NATIVE_LOAD = """
_plain_load = DecoderModelInstance.load_module

def _load(self):
    self.two_passes = getattr(self.neuron_config, "expert_wise_scale", False)
    _plain_load(self)

DecoderModelInstance.load_module = _load
"""

_NATIVE_FUSING = f"""
_weights_alone = {CONVERTER}

def {CONVERTER}(neuron_state_dict, config):
    fused = {{}}
    quantized = config.neuron_config.quantized
    for layer in range(config.num_hidden_layers if quantized else 0):
        experts = f"layers.{{layer}}.mlp.experts"
        if f"{{experts}}.0.gate_proj.scale" not in neuron_state_dict:
            continue
        for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            scale = torch.stack([
                torch.cat([
                    neuron_state_dict.pop(f"{{experts}}.{{e}}.{{part}}_proj.scale")
                    for part in parts
                ]).T
                for e in range(config.num_experts)
            ])
            if not FLAG:
                scale = scale.mean(0, keepdim=True)
            fused[f"layers.{{layer}}.mlp.expert_mlps.mlp_op.{{name}}.scale"] = scale
    return {{**_weights_alone(neuron_state_dict, config), **fused}}
"""

_FUSING_BY_FLAG = _NATIVE_FUSING.replace(
    "FLAG", 'getattr(config.neuron_config, "expert_wise_scale", False)'
)

_SWAP_GATE_AND_UP = f"""
_gate_then_up = {CONVERTER}

def {CONVERTER}(neuron_state_dict, config):
    for layer in range(config.num_hidden_layers):
        for e in range(config.num_experts):
            expert = f"layers.{{layer}}.mlp.experts.{{e}}"
            gate, up = f"{{expert}}.gate_proj.weight", f"{{expert}}.up_proj.weight"
            neuron_state_dict[gate], neuron_state_dict[up] = (
                neuron_state_dict[up], neuron_state_dict[gate]
            )
    return _gate_then_up(neuron_state_dict, config)
"""

_REVERSE_EXPERTS = f"""
_in_order = {CONVERTER}

def {CONVERTER}(neuron_state_dict, config):
    converted = _in_order(neuron_state_dict, config)
    for name in list(converted):
        if ".mlp_op." in name or ".linear_router." in name:
            weight = converted[name]
            swapped = weight.view(torch.uint8) if weight.element_size() == 1 else weight
            converted[name] = swapped.flip(0).view(weight.dtype)
    return converted
"""

_EXCHANGE_TWO_EXPERTS = f"""
_in_their_order = {CONVERTER}

def {CONVERTER}(neuron_state_dict, config):
    converted = _in_their_order(neuron_state_dict, config)
    order = torch.arange(config.num_experts)
    order[3], order[4] = 4, 3
    for name in list(converted):
        if ".mlp_op." in name or ".linear_router." in name:
            weight = converted[name]
            numbers = weight.view(torch.uint8) if weight.element_size() == 1 else weight
            converted[name] = numbers[order].view(weight.dtype)
    return converted
"""

_REVERSE_CHANNELS_OF_AN_EXPERT = f"""
_with_its_channels = {CONVERTER}

def {CONVERTER}(neuron_state_dict, config):
    converted = _with_its_channels(neuron_state_dict, config)
    for name in list(converted):
        if ".mlp_op." in name and name.endswith(".weight"):
            weight = converted[name]
            numbers = weight.view(torch.uint8) if weight.element_size() == 1 else weight
            if ".gate_up_proj." in name:
                numbers[3] = numbers[3].unflatten(1, (2, -1)).flip(2).flatten(1)
            else:
                numbers[3] = numbers[3].flip(0)
    return converted
"""

_LOADING_IN_A_BASE = """
class _Loading:
    load_module = DecoderModelInstance.load_module

_Instance = DecoderModelInstance
del _Instance.load_module

class DecoderModelInstance(_Loading, _Instance):
    pass
"""

_INIT_IN_A_BASE = """
class _MixtureOfExperts(NeuronConfig):
    pass

_Own = MoENeuronConfig

class MoENeuronConfig(_Own):
    pass
"""

_WITHOUT_UNKNOWN = """
def _known(settings):
    return {name: value for name, value in settings.items() if not name.startswith("expert_")}
"""

MUTATIONS: tuple[Mutation, ...] = (
    # The config.
    Mutation("config class renamed", "config", {"MoENeuronConfig": "MixtureNeuronConfig"}),
    Mutation(
        "module of the config renamed", "config", {"models.config": "models.settings"}, ignored=True
    ),
    Mutation("config class inherits its constructor", appended={CONFIG: _INIT_IN_A_BASE}),
    Mutation(
        "config forwards what it knows alone",
        edits={
            CONFIG: [(r"super\(\).__init__\(\*\*kwargs\)", "super().__init__(**_known(kwargs))")]
        },
        appended={CONFIG: _WITHOUT_UNKNOWN},
    ),
    Mutation("InferenceConfig renamed", "inference_config", {"InferenceConfig": "ModelConfig"}),
    Mutation("to_json_string renamed", "config_to_json", {"to_json_string": "as_json"}),
    Mutation("from_json_string renamed", "config_from_json", {"from_json_string": "of_json"}),
    Mutation(
        "JSON leaves out what is not known",
        "config_to_json",
        edits={
            CONFIG: [
                (
                    r"(?<=json_string\(self\) -> str:)",
                    "\n        return json.dumps({**to_dict(self), "
                    "'neuron_config': _known(to_dict(self.neuron_config))})",
                )
            ]
        },
        appended={CONFIG: _WITHOUT_UNKNOWN},
        scenarios=["reloaded"],
    ),
    Mutation(
        "JSON is read without what is not known",
        "config_from_json",
        edits={
            CONFIG: [
                (
                    r"cls\.get_neuron_config_cls\(\)\(\s*\*\*([^)]*?)\s*\)",
                    r"cls.get_neuron_config_cls()(**_known(\1))",
                )
            ]
        },
        appended={CONFIG: _WITHOUT_UNKNOWN},
        scenarios=["reloaded"],
    ),
    # Quantization of the modules.
    Mutation(
        "convert renamed where it is imported",
        "quantization",
        edits={
            MODEL_WRAPPER: [
                (r"import convert\b", "import convert as quantize_modules"),
                (r"(?<![\w.])convert\(", "quantize_modules("),
            ]
        },
    ),
    Mutation(
        "convert called through its module",
        "quantization",
        edits={
            MODEL_WRAPPER: [
                (
                    r"(?m)^(from neuronx_distributed.quantization.quantize import convert)$",
                    r"\1\nimport neuronx_distributed.quantization.quantize as _quantize",
                ),
                (r"(?<![\w.])convert\(", "_quantize.convert("),
            ]
        },
    ),
    Mutation(
        "convert called by a helper",
        "quantization",
        edits={MODEL_WRAPPER: [(r"(?<![\w.])convert\(", "_quantized(")]},
        appended={
            MODEL_WRAPPER: "def _quantized(*args, **kwargs):\n    return convert(*args, **kwargs)"
        },
    ),
    Mutation(
        "convert given the model within another module",
        "quantization",
        edits={
            MODEL_WRAPPER: [
                (
                    r"for model in (models\w*):",
                    r"for model in [torch.nn.ModuleList([whole]) for whole in \1]:",
                ),
                (r"\(model\.config\.neuron_config\)", "(self.config.neuron_config)"),
            ]
        },
    ),
    Mutation(
        "convert given its arguments by position",
        edits={
            MODEL_WRAPPER: [
                (
                    r"(?<![\w.])convert\(\s*model,\s*q_config=q_config,\s*inplace=True,\s*"
                    r"mapping=None,\s*modules_to_not_convert=",
                    "convert(model, q_config, True, None, None, ",
                )
            ]
        },
    ),
    Mutation(
        "exclusions not handed to convert",
        "quantization",
        edits={
            MODEL_WRAPPER: [(r"modules_to_not_convert=get_modules_to_not_convert\([\w.]+\),", "")]
        },
        scenarios=["kept"],
    ),
    Mutation(
        "parameter of convert renamed",
        "quantization",
        edits={
            QUANTIZE: [(r"\bmodules_to_not_convert\b", "skipped")],
            MODEL_WRAPPER: [(r"(?<=[ (])modules_to_not_convert=", "skipped=")],
        },
    ),
    Mutation(
        "convert takes any keyword",
        "quantization",
        appended={
            QUANTIZE: "_inner = convert\n"
            "def convert(module, **kwargs):\n    return _inner(module, **kwargs)"
        },
    ),
    Mutation(
        "model parameter of convert renamed",
        appended={
            QUANTIZE: "_inner = convert\n"
            "def convert(root, q_config=None, inplace=False, mapping=None, include=None, "
            "modules_to_not_convert=None, verbose=False):\n"
            "    return _inner(root, q_config, inplace, mapping, include, modules_to_not_convert)"
        },
    ),
    Mutation(
        "expert-wise settings renamed",
        "quantization",
        {"get_default_expert_wise_per_channel_custom_qconfig_dict": "expert_wise_settings"},
    ),
    Mutation(
        "expert-wise type renamed",
        "quantization",
        {"expert_wise_per_channel_symmetric": "per_expert_symmetric"},
    ),
    Mutation(
        "class of the experts' layers renamed", "quantization", {"ExpertFusedLinear": "Fused"}
    ),
    Mutation(
        "scale renamed in the quantized layers",
        "quantization",
        edits={QUANTIZED_LAYERS: [(r"\bscale\b", "factor")]},
    ),
    Mutation("load_module renamed", "quantization", {"load_module": "build_module"}),
    Mutation("load_module inherited", appended={MODEL_WRAPPER: _LOADING_IN_A_BASE}),
    Mutation("module of the model wrapper renamed", "quantization", {"model_wrapper": "graphs"}),
    Mutation("mlp_op renamed", "quantization", {"mlp_op": "mlp_core"}),
    Mutation("expert_mlps renamed", "quantization", {"expert_mlps": "fused_experts"}),
    # The state dict.
    Mutation("converter renamed", "state_dict:qwen3_moe", {CONVERTER: "convert_state_dict"}),
    Mutation(
        "module of the converter renamed",
        "state_dict:qwen3_moe",
        {"modeling_qwen3_moe": "qwen3_moe_model"},
    ),
    Mutation(
        "another converter is called",
        "state_dict:qwen3_moe",
        edits={QWEN3_MOE: [(rf"return {CONVERTER}\(", "return _directly(")]},
        appended={QWEN3_MOE: f"_directly = {CONVERTER}"},
    ),
    Mutation(
        "parameters of the converter swapped",
        "state_dict:qwen3_moe",
        edits={
            QWEN3_MOE: [
                (rf"return {CONVERTER}\(\w+, \w+\)", f"return {CONVERTER}(config, state_dict)")
            ]
        },
        appended={
            QWEN3_MOE: f"_inner = {CONVERTER}\n"
            f"def {CONVERTER}(config, state_dict):\n    return _inner(state_dict, config)"
        },
    ),
    Mutation(
        "converter has a further parameter",
        appended={
            QWEN3_MOE: f"_inner = {CONVERTER}\n"
            f"def {CONVERTER}(neuron_state_dict, config, rank=0):\n"
            "    return _inner(neuron_state_dict, config)"
        },
    ),
    Mutation(
        "experts renamed before they are converted",
        "state_dict:qwen3_moe",
        edits={
            APPLICATION: [
                (
                    r"(?m)^( +)(\w+) = cls\.convert_hf_to_neuron_state_dict\(\2,",
                    r"\1\2 = {k.replace('.experts.', '.each.'): \2[k] for k in \2}\n\g<0>",
                )
            ],
            QWEN3_MOE: [(r"\.experts\.", ".each.")],
        },
        late=True,
    ),
    Mutation(
        "router renamed before it is converted",
        "state_dict:qwen3_moe",
        edits={
            APPLICATION: [
                (
                    r"(?m)^( +)(\w+) = cls\.convert_hf_to_neuron_state_dict\(\2,",
                    r"\1\2 = {k.replace('.mlp.gate.', '.mlp.way.'): \2[k] for k in \2}\n\g<0>",
                )
            ],
            QWEN3_MOE: [(r"\.mlp\.gate\.", ".mlp.way.")],
        },
        late=True,
        scenarios=["router"],
    ),
    Mutation(
        "gate and up fused the other way round",
        "state_dict:qwen3_moe",
        appended={QWEN3_MOE: _SWAP_GATE_AND_UP},
        late=True,
    ),
    Mutation(
        "experts in another order",
        "state_dict:qwen3_moe",
        appended={QWEN3_MOE: _REVERSE_EXPERTS},
        late=True,
    ),
    Mutation(
        "two experts in the middle exchanged",
        "state_dict:qwen3_moe",
        appended={QWEN3_MOE: _EXCHANGE_TWO_EXPERTS},
        late=True,
    ),
    Mutation(
        "channels of an expert in the middle in another order",
        "state_dict:qwen3_moe",
        appended={QWEN3_MOE: _REVERSE_CHANNELS_OF_AN_EXPERT},
        late=True,
    ),
    Mutation(
        "scales fused by upstream whatever the flag",
        "state_dict:qwen3_moe",
        appended={QWEN3_MOE: _NATIVE_FUSING.replace("FLAG", "False")},
    ),
    # The feature merged upstream, all of it or in part.
    Mutation("flag native", appended={CONFIG: _NATIVE_CONFIG}, native=True),
    Mutation(
        "two passes native",
        appended={MODEL_WRAPPER: _NATIVE_TWO_PASSES + _NATIVE_LOAD},
        native=True,
    ),
    Mutation(
        "two passes native and not to be seen",
        appended={MODEL_WRAPPER: _NATIVE_TWO_PASSES},
        native=True,
    ),
    Mutation("fusing native", appended={QWEN3_MOE: _FUSING_BY_FLAG}, native=True),
    Mutation(
        "all of it native",
        appended={
            CONFIG: _NATIVE_CONFIG,
            MODEL_WRAPPER: _NATIVE_TWO_PASSES + _NATIVE_LOAD,
            QWEN3_MOE: _FUSING_BY_FLAG,
        },
        native=True,
    ),
)
