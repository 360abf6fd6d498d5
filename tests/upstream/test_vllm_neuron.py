"""vLLM-Neuron on real NxDI: its own functions merge, check, copy, reload and compile with the flag.

Its sources are the folders ``vllm-neuron-0.2.0`` and so on beside the releases (see
:mod:`tests.upstream`), and vLLM has to be installed (``pip install --no-deps vllm==0.11.0``).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nxdi_expertscale import quantize_checkpoint
from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from tests.harness import models, readme
from tests.harness.targets import Target, vllm_neuron_releases

pytestmark = pytest.mark.usefixtures("active", "one_rank")

OVERRIDE = readme.vllm_override()


class CompiledError(Exception):
    """Raised where NxDI would be asked to compile."""


@pytest.fixture(params=list(vllm_neuron_releases()) or ["no release"])
def loader(
    request: pytest.FixtureRequest, target: Target, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """vLLM-Neuron's model loader."""
    folder = vllm_neuron_releases().get(request.param)
    if target.is_double or folder is None:
        pytest.skip("needs the sources of NxDI and of vLLM-Neuron")
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm_neuron"]:
        monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module("vllm_neuron.worker.neuronx_distributed_model_loader")
    assert Path(module.__file__ or "").is_relative_to(folder)
    # It asks for vLLM's config, which knows the device.
    monkeypatch.setattr(module, "LogitsProcessor", lambda *_, **__: torch.nn.Identity())
    return module


@pytest.fixture
def model(target: Target, moe: Path, tmp_path: Path) -> Path:
    """A model that the release offers to vLLM-Neuron: NxDI 0.5 does not offer Qwen3 MoE."""
    if target.version < (0, 6):
        return models.save_mixtral(tmp_path / "mixtral")
    return Path(shutil.copytree(moe, tmp_path / "moe"))


@pytest.fixture
def application(loader: ModuleType, model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """NxDI's application of the model, as vLLM-Neuron finds it, without a compiler."""
    (architecture,) = json.loads((model / "config.json").read_text())["architectures"]
    found = loader._get_neuron_model_cls(architecture)

    def compile_nothing(_self: Any, _path: str) -> None:
        raise CompiledError

    monkeypatch.setattr(found, "compile", compile_nothing)
    return found


@pytest.fixture
def fp8(model: Path, tmp_path: Path) -> dict[str, Any]:
    """What the README writes, and the folder that it names."""
    folder = tmp_path / "fp8"
    quantize_checkpoint(model, folder)
    return {**OVERRIDE, "quantized_checkpoints_path": str(folder)}


def get_model(
    loader: ModuleType, model: Path, override: dict[str, Any], speculation: Any = None
) -> Any:
    """What vLLM-Neuron's worker does with what a user gives ``vllm serve``."""
    from transformers import AutoConfig

    return loader.get_neuron_model(
        SimpleNamespace(
            hf_config=AutoConfig.from_pretrained(model),
            dtype=torch.bfloat16,
            model=str(model),
            max_model_len=models.SEQUENCE,
            max_prompt_length=None,
            max_context_length=None,
        ),
        SimpleNamespace(block_size=32, num_gpu_blocks_override=None, enable_prefix_caching=False),
        SimpleNamespace(tensor_parallel_size=1),
        SimpleNamespace(
            chunked_prefill_enabled=False,
            enable_chunked_prefill=False,
            max_num_seqs=8,
            max_model_len=models.SEQUENCE,
        ),
        None,
        speculative_config=speculation,
        additional_config={"override_neuron_config": dict(override)},
    )


def config_of(
    loader: ModuleType,
    application: Any,
    model: Path,
    override: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    speculation: Any = None,
) -> Any:
    """The config that vLLM-Neuron compiles a model with."""
    made: list[Any] = []

    def note(_self: Any, _path: str, _cls: Any, config: Any, _compiled: str) -> None:
        made.append(config)
        raise CompiledError

    monkeypatch.setattr(loader.NeuronCausalLM, "_compile_and_load_model", note)
    with pytest.raises(CompiledError):
        get_model(loader, model, override, speculation)
    return made[0]


def save_compiled_config(
    loader: ModuleType, application: Any, model: Path, folder: Path, settings: dict[str, Any]
) -> Path:
    """The config of a model that was compiled to a folder, as NxDI saves it."""
    neuron_config = application.get_neuron_config_cls()(
        batch_size=8, seq_len=models.SEQUENCE, torch_dtype=torch.bfloat16, **settings
    )
    config = application.get_config_cls()(
        neuron_config, load_config=loader.load_pretrained_config(str(model))
    )
    config.save(str(folder))
    return folder / "neuron_config.json"


def test_flag_reaches_the_config(
    loader: ModuleType,
    application: Any,
    model: Path,
    fp8: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(loader, application, model, fp8, monkeypatch)

    assert config.neuron_config.expert_wise_scale is True
    assert '"expert_wise_scale": true' in config.to_json_string()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        # Where quantization_type is not named, vLLM-Neuron takes per_tensor_symmetric.
        ({"quantization_type": None}, "needs quantization_type='per_channel_symmetric'"),
        ({"expert_wise_scale": "true"}, "must be true or false, not 'true'"),
        ({"expert_wise_scale": 1}, "must be true or false, not 1"),
    ],
)
def test_what_is_wrong_is_refused_with_what_to_write(
    loader: ModuleType,
    application: Any,
    model: Path,
    fp8: dict[str, Any],
    override: dict[str, Any],
    says: str,
) -> None:
    changed = {**fp8, **override}
    given = {name: value for name, value in changed.items() if value is not None}

    with pytest.raises(ConfigurationError, match=says):
        get_model(loader, model, given)


def test_draft_copied_from_the_target(
    loader: ModuleType,
    application: Any,
    model: Path,
    fp8: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its neuron config is a copy, which in vLLM-Neuron 0.2 keeps out a dense draft."""
    from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig

    gives = loader.NeuronModelBase._init_fused_spec_config.__code__.co_consts
    takes = inspect.signature(FusedSpecNeuronConfig).parameters
    if any("draft_model_cls" in names for names in gives if isinstance(names, tuple)) and (
        "draft_model_cls" not in takes
    ):
        pytest.skip("this vLLM-Neuron belongs to a newer NxDI, whose drafts have a class")
    speculation = SimpleNamespace(
        num_speculative_tokens=2,
        method="draft_model",
        model=str(model),
        draft_model_config=SimpleNamespace(model=str(model)),
    )

    config = config_of(loader, application, model, fp8, monkeypatch, speculation)

    draft_config = config.fused_spec_config.draft_config
    assert draft_config.neuron_config.expert_wise_scale is True
    assert draft_config.neuron_config.enable_fused_speculation is False
    assert draft_config.neuron_config is not config.neuron_config


def test_flag_that_is_set_on_a_draft_by_attribute_is_checked(
    loader: ModuleType, application: Any, model: Path, fp8: dict[str, Any]
) -> None:
    """Releases from 0.4 on set ``draft_overrides`` one by one."""
    if not hasattr(loader.NeuronModelBase, "_init_fused_spec_config") or "draft_overrides" not in (
        loader.NeuronModelBase._init_fused_spec_config.__code__.co_varnames
    ):
        pytest.skip("this release has no draft_overrides")
    speculation = SimpleNamespace(
        num_speculative_tokens=2,
        method="draft_model",
        model=str(model),
        draft_model_config=SimpleNamespace(model=str(model)),
    )
    override = {**fp8, "draft_overrides": {"expert_wise_scale": "true"}}

    with pytest.raises(ConfigurationError, match="must be true or false, not 'true'"):
        get_model(loader, model, override, speculation)


def test_compiling_makes_the_folder_once(
    loader: ModuleType, application: Any, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fp8"
    override = {**OVERRIDE, "quantized_checkpoints_path": str(folder)}
    made = []
    for _ in range(2):
        with pytest.raises(CompiledError):
            get_model(loader, model, override)
        made.append({path.name: path.stat().st_mtime_ns for path in folder.iterdir()})

    assert "nxdi_expertscale.json" in made[0]
    assert made[0] == made[1]


def test_artifacts_that_were_compiled_without_the_flag_are_refused(
    loader: ModuleType,
    application: Any,
    model: Path,
    fp8: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifacts = tmp_path / "artifacts"
    monkeypatch.setenv("NEURON_COMPILED_ARTIFACTS", str(artifacts))
    file = save_compiled_config(
        loader, application, model, artifacts, {**fp8, "expert_wise_scale": False}
    )

    with pytest.raises(ConfigurationError) as refused:
        get_model(loader, model, fp8)

    assert str(refused.value).startswith(f"{file}: the model was compiled without")
    assert "compile it into another folder (NEURON_COMPILED_ARTIFACTS" in str(refused.value)


@pytest.mark.parametrize(
    ("compiled", "error", "says"),
    [
        ({"expert_wise_scale": "true"}, ConfigurationError, "was compiled without"),
        ({"quantization_type": "per_tensor_symmetric"}, ConfigurationError, "quantization_type="),
    ],
)
def test_refusal_of_a_compiled_config_is_no_reason_to_compile_anew(
    loader: ModuleType,
    application: Any,
    model: Path,
    fp8: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    artifacts = tmp_path / "artifacts"
    monkeypatch.setenv("NEURON_COMPILED_ARTIFACTS", str(artifacts))
    file = save_compiled_config(loader, application, model, artifacts, fp8)
    written = json.loads(file.read_text())
    written["neuron_config"].update(compiled)
    file.write_text(json.dumps(written))

    with pytest.raises(error, match=says):
        get_model(loader, model, fp8)


def test_refusal_of_a_checkpoint_is_no_reason_to_compile_anew(
    loader: ModuleType,
    application: Any,
    model: Path,
    fp8: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifacts = tmp_path / "artifacts"
    monkeypatch.setenv("NEURON_COMPILED_ARTIFACTS", str(artifacts))
    save_compiled_config(loader, application, model, artifacts, fp8)
    # The compiled model itself, and the sharding of its weights, which begins with reading them.
    monkeypatch.setattr(
        application,
        "get_builder",
        lambda model: SimpleNamespace(shard_checkpoint=model.checkpoint_loader_fn),
    )
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: torch.nn.Identity())
    lost = spoil(Path(fp8["quantized_checkpoints_path"]))

    with pytest.raises(CheckpointError, match=lost):
        get_model(loader, model, fp8)


def spoil(folder: Path) -> str:
    """Take one expert's scale out of a folder; its name as NxDI has it."""
    (folder / "nxdi_expertscale.json").unlink()
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in sorted(tensors):
            if ".experts.3." in name and name.endswith(".weight_scale"):
                del tensors[name]
                save_file(tensors, file, {"format": "pt"})
                return name.removeprefix("model.").removesuffix("weight_scale") + "scale"
    raise AssertionError("the folder has no scale of an expert")


def test_artifacts_that_were_compiled_with_the_flag_are_loaded(
    loader: ModuleType,
    application: Any,
    model: Path,
    fp8: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifacts = tmp_path / "artifacts"
    monkeypatch.setenv("NEURON_COMPILED_ARTIFACTS", str(artifacts))
    save_compiled_config(loader, application, model, artifacts, fp8)
    loaded: list[str] = []
    monkeypatch.setattr(application, "load", lambda _self, path: loaded.append(str(path)))

    assert get_model(loader, model, fp8).neuron_config.expert_wise_scale is True
    assert loaded == [str(artifacts)]
