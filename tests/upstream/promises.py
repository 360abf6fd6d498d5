"""What the patches rely on in NxDI and NxD: recorded from each release, kept by the double.

``promises.json`` holds it for each release. ``test_promises.py`` holds the double to the newest one
in every run, and the file to the real sources where they are at hand. To write it anew, with the
releases in the folder that ``NXDI_EXPERTSCALE_UPSTREAM`` names::

    python -m tests.upstream.promises
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import nxdi_expertscale
from nxdi_expertscale.families.built_in import OF_NXDI
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.code import names_in_code
from nxdi_expertscale.patches import nxdi_patches
from nxdi_expertscale.settings.settings import FLAG
from tests.harness import processes, targets

FILE = Path(__file__).with_name("promises.json")
EVERY_RELEASE = "every release"
"""What the file keeps once, because it is the same in all of them."""

Record = dict[str, Any]

NXDI, NXD = "neuronx_distributed_inference", "neuronx_distributed"
CONFIG = f"{NXDI}.models.config"
WRAPPER = f"{NXDI}.models.model_wrapper"
QUANTIZATION_CONFIG = f"{NXD}.quantization.quantization_config"
BLOCKWISE = f"{NXD}.modules.moe.blockwise"
TRACE = f"{NXD}.trace.trace"
MODEL_BUILDER = f"{NXD}.trace.model_builder"
PARALLEL_STATE = f"{NXD}.parallel_layers.parallel_state"
EXPERT_LAYERS = f"{NXD}.modules.moe.moe_parallel_layers"

ENTRANCES = {
    "qwen3_moe": "NeuronQwen3MoeForCausalLM.convert_hf_to_neuron_state_dict",
    "mixtral": "NeuronMixtralForCausalLM.convert_hf_to_neuron_state_dict",
}
"""By which NxDI calls a family's converter, where they are not the same."""

CALLED = (
    f"{NXDI}.inference_demo:create_neuron_config",
    f"{QUANTIZATION_CONFIG}:QuantizedDtype.get_dtype",
    f"{QUANTIZATION_CONFIG}:get_default_expert_wise_per_channel_custom_qconfig_dict",
    f"{BLOCKWISE}:KernelConfig",
    f"{BLOCKWISE}:check_kernel_availability",
    f"{TRACE}:preprocess_checkpoint",
    f"{MODEL_BUILDER}:ModelBuilder.shard_checkpoint",
    f"{PARALLEL_STATE}:destroy_model_parallel",
    f"{PARALLEL_STATE}:model_parallel_is_initialized",
    f"{TRACE}:get_sharded_checkpoint",
    f"{NXDI}.models.application_base:init_custom_process_group_fn",
    f"{NXDI}.utils.hf_adapter:load_pretrained_config",
)
"""What is called, or looked at, beside the functions that are patched."""

ENUMERATIONS = (
    f"{QUANTIZATION_CONFIG}:QuantizationType",
    f"{QUANTIZATION_CONFIG}:QuantizedDtype",
    f"{BLOCKWISE}:LogicalNCConfig",
)

NAMED = {
    f"{NXDI}.models.application_base:NeuronApplicationBase.save_quantized_state_dict": (
        "quantized_checkpoints_path",
    ),
    f"{NXDI}.inference_demo:create_neuron_config": ("vars",),
    f"{NXDI}.inference_demo:setup_run_parser": (FLAG, "--expert-wise-scale"),
    f"{CONFIG}:MoENeuronConfig.__init__": (FLAG,),
    f"{WRAPPER}:DecoderModelInstance.load_module": (FLAG, "convert"),
    f"{NXDI}.models.application_base:NeuronApplicationBase.get_state_dict": ("load_state_dict",),
    f"{TRACE}:preprocess_checkpoint": ("invoke_preshard_hook",),
    f"{MODEL_BUILDER}:ModelBuilder.shard_checkpoint": (
        "checkpoint_loader",
        "model_collection",
        "preprocess_checkpoint",
    ),
}
"""Names that the patches look for in a function's code."""


def record(nxdi: Any) -> Record:
    """Record what the NxDI and the NxD of this process have.

    Args:
        nxdi: :mod:`tests.harness.running`, on one rank and without our patches.
    """
    return {
        **{f"signature of {name}": _signature(_find(name)) for name in _functions()},
        **{f"named in {name}": _named(name, words) for name, words in _named_in().items()},
        **{f"scales named in {name}": _scales_in(name) for name in _converters()},
        **{f"default of {name}": value for name, value in _defaults(nxdi.MoENeuronConfig())},
        **{f"members of {name}": _members(_find(name)) for name in ENUMERATIONS},
        **{f"experts of {family.name} are made by": _maker(family) for family in OF_NXDI},
        **dict(_expert_layers()),
    }


def recorded(release: str) -> Record:
    """What the file holds of a release.

    Raises:
        KeyError: It holds none of that name.
    """
    found: dict[str, Record] = json.loads(FILE.read_text(encoding="utf-8"))
    return {**found[EVERY_RELEASE], **found[release]}


def newest() -> str:
    """The newest release that the file holds, for which the double stands."""
    found = json.loads(FILE.read_text(encoding="utf-8")).keys() - {EVERY_RELEASE}
    return max(found, key=lambda name: [int(part) for part in name.split(".")])


def modules_of_upstream() -> set[str]:
    """The modules of NxDI and NxD, and what it takes from them, that the package names."""
    found = set()
    for path in Path(nxdi_expertscale.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value.partition(":")[0])
    return {name for name in found if name.startswith((f"{NXDI}.", f"{NXD}."))}


def _find(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return attrgetter(attribute)(importlib.import_module(module))


def _functions() -> set[str]:
    patched = {
        f"{patch.module}:{patch.attribute}"
        for patch in nxdi_patches(OF_NXDI)
        if patch.module.startswith((NXDI, NXD))
    }
    return {*patched, *CALLED, *_entrances()}


def _entrances() -> dict[str, str]:
    """The converter of each entrance, by the entrance's name."""
    converters = {family.name: family.converter.partition(":") for family in OF_NXDI}
    return {
        f"{converters[name][0]}:{entrance}": converters[name][2]
        for name, entrance in ENTRANCES.items()
    }


def _named_in() -> dict[str, tuple[str, ...]]:
    return {**NAMED, **{entrance: (name,) for entrance, name in _entrances().items()}}


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    plain = [part.replace(annotation=empty) for part in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=empty))


def _named(name: str, words: tuple[str, ...]) -> dict[str, bool]:
    names = names_in_code(_find(name))
    return {word: word in names for word in words}


def _converters() -> list[str]:
    """The converters that are to know nothing of scales, and by what NxDI calls them."""
    unaware = [family.converter for family in OF_NXDI if not family.converter_knows_scales]
    return [*unaware, *_entrances()]


def _scales_in(name: str) -> list[str]:
    return sorted(word for word in names_in_code(_find(name)) if "scale" in word)


def _members(enumeration: Any) -> dict[str, Any]:
    return {name: _as_json(member.value) for name, member in enumeration.__members__.items()}


def _defaults(neuron_config: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of a config that the package names, where it is made without keywords."""
    words = set(_words_of("settings", "patches"))
    for name, value in vars(neuron_config).items():
        if name in words:
            yield name, _as_json(value)


def _words_of(*rooms: str) -> Iterator[str]:
    for room in rooms:
        for path in (Path(nxdi_expertscale.__file__).parent / room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.Attribute):
                    yield node.attr


def _maker(family: MoEFamily) -> str | None:
    """The module of what makes a family's experts; None where its modeling file has no such."""
    modeling = importlib.import_module(family.converter.partition(":")[0])
    maker = getattr(modeling, "initialize_moe_module", None)
    return None if maker is None else str(maker.__module__)


def _expert_layers() -> Iterator[tuple[str, Any]]:
    """What ``convert`` makes of layers of four experts, for each type of scales."""
    import torch

    layers = importlib.import_module(EXPERT_LAYERS)
    config = importlib.import_module(QUANTIZATION_CONFIG)
    convert = importlib.import_module(WRAPPER).convert
    for kind, settings in (
        ("per channel", config.get_default_per_channel_custom_qconfig_dict()),
        ("expert-wise", config.get_default_expert_wise_per_channel_custom_qconfig_dict()),
    ):
        yield f"settings of {kind} scales", sorted(settings)
        for name in ("ExpertFusedColumnParallelLinear", "ExpertFusedRowParallelLinear"):
            made = getattr(layers, name)(4, 6, 8, dtype=torch.float32)
            model = torch.nn.Sequential(made)
            convert(
                model,
                q_config={**settings, "quantized_dtype": config.QuantizedDtype.F8E4M3},
                inplace=True,
                mapping=None,
                modules_to_not_convert=None,
            )
            yield f"{name} with {kind} scales", _described(model[0])


def _described(layer: Any) -> dict[str, Any]:
    return {
        "class": type(layer).__name__,
        "is an ExpertFusedLinear": any(
            cls.__name__ == "ExpertFusedLinear" for cls in type(layer).__mro__
        ),
        "quantization_type": _as_json(layer.quantization_type),
        "weight": [*layer.weight.shape, str(layer.weight.dtype)],
        "scale": [*layer.scale.shape, str(layer.scale.dtype)],
    }


def _as_json(value: Any) -> Any:
    """A value as JSON keeps it: of an enumeration its member's value, of an object its class."""
    if isinstance(value, enum.Enum):
        return _as_json(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    text = str(value)
    return text if text.startswith("torch.") or isinstance(value, float) else type(value).__name__


def _record_as_rank(_rank: int) -> dict[str, Any]:
    from tests.harness import running

    nxdi_expertscale.deactivate()
    return record(running)


def main() -> int:
    """Record every release, and write the file."""
    releases = [target for target in targets.all_targets().values() if not target.is_double]
    if not releases:
        print(f"{targets.UPSTREAM_VARIABLE} names no release", file=sys.stderr)
        return 2
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for release in releases:
            store = Path(folder, release.name)
            (found[release.name],) = processes.run_on_ranks(release, 1, store, _record_as_rank)
    first = next(iter(found.values()))
    common = {
        name: value
        for name, value in first.items()
        if all(name in of_one and of_one[name] == value for of_one in found.values())
    }
    own = {
        release: {name: value for name, value in of_one.items() if name not in common}
        for release, of_one in found.items()
    }
    text = json.dumps({EVERY_RELEASE: common, **own}, indent=1, sort_keys=True)
    FILE.write_text(f"{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
