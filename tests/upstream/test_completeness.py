"""Nothing is lost on the way in: each link between checkpoint and module, broken."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.testing import whole_model
from nxdi_expertscale.testing.running import first_instance
from tests.harness import compiling, models, processes
from tests.harness.targets import Target

pytestmark = pytest.mark.usefixtures("active")

Tensors = dict[str, torch.Tensor]


def _unchanged(_: Any) -> None:
    pass


@dataclass(frozen=True)
class Break:
    """One way to break the way from a checkpoint's tensor to the module that needs it.

    Attributes:
        expected: What the error says, after the prefix of the draft or target.
        edit: Changes the checkpoint's tensors.
        edit_converted: Changes the state dict that NxDI's converter has made.
        edit_model: Changes the model that NxDI has built.
    """

    expected: str
    edit: Callable[[Tensors], None] = _unchanged
    edit_converted: Callable[[Tensors], None] = _unchanged
    edit_model: Callable[[Any], None] = _unchanged


NORM = "norm.weight"
O_PROJ = "layers.0.self_attn.o_proj"
BIAS = "e_score_correction_bias"


class Linear(nn.Linear):
    """A layer that NxD does not know, and that may compute anything."""


def _never_convert(model: Any, cls: type[nn.Linear] = Linear) -> None:
    projection = model.layers[0].self_attn.o_proj
    out, inputs = projection.o_proj.weight.shape
    projection.o_proj = cls(inputs, out, bias=False)


def _add_router_bias(model: Any) -> None:
    bias = nn.Parameter(torch.zeros(models.EXPERTS), requires_grad=False)
    setattr(model.layers[0].mlp.router, BIAS, bias)


def _add_bias_to_checkpoint(tensors: Tensors) -> None:
    tensors[f"layers.0.mlp.gate.{BIAS}"] = torch.ones(models.EXPERTS)


def _rename_scale(state_dict: Tensors) -> None:
    state_dict[f"{O_PROJ}.factor"] = state_dict.pop(f"{O_PROJ}.scale")


def _drop(name: str) -> Callable[[Tensors], None]:
    def drop(tensors: Tensors) -> None:
        del tensors[name]

    return drop


def _shorten(name: str) -> Callable[[Tensors], None]:
    def shorten(tensors: Tensors) -> None:
        tensors[name] = tensors[name][:-1].clone()

    return shorten


def _add(name: str) -> Callable[[Tensors], None]:
    def add(tensors: Tensors) -> None:
        tensors[name] = torch.ones(4)

    return add


BREAKS: Mapping[str, Break] = {
    "linear that NxDI never converts": Break(
        rf"{O_PROJ}.o_proj.weight: it is torch.float8_e4m3fn, and its module \(Linear\) reads that "
        "as plain numbers",
        edit_model=_never_convert,
    ),
    "router bias left as initialised": Break(
        rf"layers.0.mlp.router.{BIAS}: missing.* would run with what it was initialised with",
        edit=_add_bias_to_checkpoint,
        edit_model=_add_router_bias,
    ),
    "scale renamed": Break(
        rf"{O_PROJ}.o_proj.scale: missing.*factor", edit_converted=_rename_scale
    ),
    "norm missing": Break(rf"{NORM}: missing", edit=_drop(NORM)),
    "projection missing": Break(
        rf"{O_PROJ}.o_proj.weight: missing", edit_converted=_drop(f"{O_PROJ}.weight")
    ),
    "norm of another shape": Break(
        rf"{NORM}: its shape is \[63\], and its module .* takes \[64\]", edit=_shorten(NORM)
    ),
    "bias that no module has": Break(
        r"layers.0.self_attn\S*.q_proj.bias: no module takes it",
        edit=_add("layers.0.self_attn.q_proj.bias"),
    ),
}


def edited(folder: Path, copied: Path, edit: Callable[[Tensors], None]) -> Path:
    """A copy of a checkpoint of NxDI's own step, whose names have no ``model.``, with a change."""
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    edit(tensors)
    copied.mkdir()
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


def broken(application: Any, broke: Break) -> Any:
    """An application of NxDI whose converter and modules are broken."""

    class Model(application._model_cls):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            broke.edit_model(self)

    class Application(application):
        _model_cls = Model
        # What fused speculation writes on the class.
        _FUSED_PREFIX = ""

        @staticmethod
        def convert_hf_to_neuron_state_dict(state_dict: Any, config: Any) -> Any:
            converted = application.convert_hf_to_neuron_state_dict(state_dict, config)
            broke.edit_converted(converted)
            return converted

    return Application


@pytest.fixture(scope="module")
def fp8(nxdi: Any, moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return nxdi.quantize(moe, tmp_path_factory.mktemp("fp8"))


def application_of(
    moe: Path, fp8: Mapping[str, Any], folder: Path, broke: Break, **settings: Any
) -> Any:
    """An application whose way is broken at one link."""
    from tests.harness import running

    checkpoint = edited(Path(fp8["quantized_checkpoints_path"]), folder, broke.edit)
    config = running.inference_config(
        moe, **{**fp8, "quantized_checkpoints_path": str(checkpoint), **settings}
    )
    return broken(running.application_cls(moe), broke)(str(moe), config)


@pytest.mark.parametrize("name", BREAKS)
def test_broken_link_is_refused_when_weights_are_loaded(
    nxdi: Any, moe: Path, fp8: dict[str, Any], tmp_path: Path, name: str
) -> None:
    application = application_of(moe, fp8, tmp_path / "fp8", BREAKS[name], expert_wise_scale=True)

    with pytest.raises(CheckpointError, match=BREAKS[name].expected):
        nxdi.load_application(application)


@pytest.mark.parametrize(
    "name", ["linear that NxDI never converts", "router bias left as initialised"]
)
def test_broken_link_is_warned_of_without_the_flag(
    nxdi: Any,
    moe: Path,
    fp8: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    application = application_of(moe, fp8, tmp_path / "fp8", BREAKS[name])

    with caplog.at_level(logging.WARNING, "nxdi_expertscale"):
        instance = first_instance(application)
        load_weights(application, instance.module)

    warnings = [line for line in caplog.messages if "the model may answer nonsense: " in line]
    assert len([line for line in warnings if re.search(BREAKS[name].expected, line)]) == 1


def test_plain_linear_that_nxdi_never_converts_gets_numbers(
    nxdi: Any,
    moe: Path,
    fp8: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = Break("", edit_model=lambda model: _never_convert(model, nn.Linear))
    application = application_of(moe, fp8, tmp_path / "fp8", plain, expert_wise_scale=True)

    with caplog.at_level(logging.WARNING, "nxdi_expertscale"):
        loaded = nxdi.load_application(application)

    weight = loaded.module.layers[0].self_attn.o_proj.o_proj.weight
    expected = nxdi.load(moe).module.layers[0].self_attn.o_proj.o_proj.weight
    assert weight.dtype == expected.dtype
    assert whole_model.relative_error(weight, expected) < whole_model.WITHIN_FP8
    assert [line for line in caplog.messages if "were dequantized: o_proj;" in line]


def load_weights(application: Any, module: Any) -> None:
    from neuronx_distributed.trace.trace import get_sharded_checkpoint

    get_sharded_checkpoint(application.checkpoint_loader_fn(), module, 0, 1)


def test_unquantized_model_is_left_alone(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    broke = Break("", edit_model=_add_router_bias)
    application = broken(nxdi.application_cls(moe), broke)(str(moe), nxdi.inference_config(moe))

    instance = first_instance(application)
    load_weights(application, instance.module)


def test_exclusion_of_a_module_that_the_checkpoint_has_quantized_is_refused(
    nxdi: Any, moe: Path, fp8: dict[str, Any]
) -> None:
    """NxD leaves the module as it is, and its weight is that of a quantized one."""
    asked = {**fp8, "modules_to_not_convert": [nxdi.ROUTER, "o_proj.o_proj"]}

    with pytest.raises(Exception, match=r"o_proj") as refused:
        nxdi.load(moe, **asked, expert_wise_scale=True)

    assert "ExpertScaleError" in [kind.__name__ for kind in type(refused.value).__mro__]


def speculating(
    moe: Path, fp8: Mapping[str, Any], folder: Path, broke: Break, part: str, **settings: Any
) -> Any:
    """A target with a draft of its kind, one of which is broken."""
    from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig

    from tests.harness import running

    whole = Path(fp8["quantized_checkpoints_path"])
    paths = {"draft_model": whole, "target_model": whole}
    paths[part] = edited(whole, folder, broke.edit)
    asked = {**fp8, "quantized_checkpoints_path": str(paths["target_model"]), **settings}
    config, draft = running.configs_of_a_pair(moe, **asked, expert_wise_scale=True)
    cls = broken(running.application_cls(moe), Break(""))

    class Model(cls._model_cls):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            is_target = config.neuron_config.enable_fused_speculation
            if is_target == (part == "target_model"):
                broke.edit_model(self)

    cls._model_cls = Model
    config.fused_spec_config = FusedSpecNeuronConfig(
        Model, draft_config=draft, draft_model_path=str(paths["draft_model"])
    )
    return cls(str(moe), config)


@pytest.mark.parametrize("part", ["draft_model", "target_model"])
@pytest.mark.parametrize(
    "name",
    ["linear that NxDI never converts", "router bias left as initialised", "norm missing"],
)
def test_broken_link_of_a_draft_or_its_target_is_refused(
    nxdi: Any, moe: Path, fp8: dict[str, Any], tmp_path: Path, name: str, part: str
) -> None:
    application = speculating(moe, fp8, tmp_path / "fp8", BREAKS[name], part)

    with pytest.raises(CheckpointError, match=rf"{part}.{BREAKS[name].expected}"):
        nxdi.load_application(application)


# The way to a device, in a process of its own: NxD's ModelBuilder has its own parallel state.


def _read_values(state_dict: Tensors) -> None:
    assert state_dict[NORM].sum().item() > 0


LATE = {
    "converter that reads values": "the model's converter needs their values",
    "loader of its own": "the model reads them in its own way",
}
"""What is checked after the compilation only, and the reason in the log."""

PARTS = ("", "draft_model", "target_model")
BROKEN_PARTS = ("router bias left as initialised", "norm missing")
"""What is broken in a draft and in a target; the rest is one code for all."""


def outcomes(moe: Path, fp8: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """What comes of each broken link when graphs are compiled, and weights cut for the ranks."""
    import nxdi_expertscale

    nxdi_expertscale.activate()
    asked = {"expert_wise_scale": True, "tp_degree": 2}
    applications: dict[str, Any] = {}
    for name, broke in {"nothing": Break(""), **BREAKS}.items():
        at = folder / name
        applications[name] = application_of(moe, fp8, at, broke, **asked)
        for part in PARTS[1:] if name in ("nothing", *BROKEN_PARTS) else ():
            at = folder / f"{name} {part}"
            applications[f"{part} {name}"] = speculating(moe, fp8, at, broke, part, tp_degree=2)
    reading = Break("", edit_converted=_read_values)
    first, second = LATE
    applications[first] = application_of(moe, fp8, folder / first, reading, **asked)
    applications[second] = application_of(moe, fp8, folder / second, Break(""), **asked)
    loader = applications[second].checkpoint_loader_fn
    applications[second].get_builder().checkpoint_loader = functools.partial(loader)
    return {name: outcome(at, folder / f"{name} shards") for name, at in applications.items()}


def outcome(application: Any, shards: Path) -> dict[str, Any]:
    """What comes of an application on its way to a device."""
    builder = application.get_builder()
    with compiling.logged() as lines:
        compiled = compiling.outcome_of(compiling.compile_graphs, builder)
    return {
        "compiled": compiled,
        "log": lines,
        "cut": compiling.outcome_of(builder.shard_checkpoint, str(shards)),
        "files": sorted(path.name for path in shards.glob("*")),
    }


@pytest.fixture(scope="module")
def on_the_way_to_a_device(
    nxdi: Any,
    target: Target,
    moe: Path,
    fp8: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("device")
    return processes.run_alone(target, compiling.on_device, folder, outcomes, moe, fp8, folder)


@pytest.mark.parametrize("name", ["nothing", *(f"{part} nothing" for part in PARTS[1:]), *LATE])
def test_whole_model_is_compiled_and_cut(
    on_the_way_to_a_device: dict[str, dict[str, Any]], name: str
) -> None:
    found = on_the_way_to_a_device[name]

    assert found["compiled"] == "CompilationStarted"
    assert found["cut"] == ""
    assert found["files"] == [f"tp{rank}_sharded_checkpoint.safetensors" for rank in range(2)]
    late = [line for line in found["log"] if "are checked after the compilation" in line]
    assert [LATE[name] in line for line in late] == ([True] if name in LATE else [])


@pytest.mark.parametrize(
    ("part", "name"),
    [("", name) for name in BREAKS] + [(part, name) for part in PARTS[1:] for name in BROKEN_PARTS],
)
def test_broken_link_is_refused_before_compilation_and_before_weights_are_cut(
    on_the_way_to_a_device: dict[str, dict[str, Any]], part: str, name: str
) -> None:
    found = on_the_way_to_a_device[f"{part} {name}".strip()]

    expected = f"CheckpointError: {part}{'.' if part else ''}{BREAKS[name].expected}"
    assert re.match(expected, found["compiled"]), found["compiled"]
    assert re.match(expected, found["cut"]), found["cut"]
    assert found["files"] == []
