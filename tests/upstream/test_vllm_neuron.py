"""vLLM-Neuron 0.2 on real NxDI: its own functions merge, check and copy the config with the flag.

Its sources are the folder ``vllm-neuron`` beside the releases (see :mod:`tests.upstream`), and
vLLM has to be installed (``pip install --no-deps vllm==0.11.0``).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from nxdi_expertscale.errors import ConfigurationError
from tests.harness import models, readme
from tests.harness.targets import Target, vllm_neuron

pytestmark = pytest.mark.usefixtures("active", "one_rank")

OVERRIDE = readme.vllm_override()


@pytest.fixture
def loader(target: Target, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """vLLM-Neuron's model loader."""
    folder = vllm_neuron()
    if target.is_double or folder is None:
        pytest.skip("needs the sources of NxDI and of vLLM-Neuron")
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("vllm_neuron.worker.neuronx_distributed_model_loader")


@pytest.fixture
def model(target: Target, moe: Path, tmp_path: Path) -> Path:
    """A model that the release offers to vLLM-Neuron: NxDI 0.5 does not offer Qwen3 MoE."""
    return models.save_mixtral(tmp_path / "mixtral") if target.version < (0, 6) else moe


@pytest.fixture
def application(loader: ModuleType, model: Path) -> Any:
    """NxDI's application of the model, as vLLM-Neuron finds it."""
    (architecture,) = json.loads((model / "config.json").read_text())["architectures"]
    return loader._get_neuron_model_cls(architecture)


def neuron_config(loader: ModuleType, override: dict[str, Any], **vllm: Any) -> dict[str, Any]:
    """The keywords that vLLM-Neuron gives to NxDI, in the steps of its ``get_neuron_model``."""
    cache = SimpleNamespace(
        block_size=32, num_gpu_blocks_override=None, enable_prefix_caching=False
    )
    scheduler = SimpleNamespace(
        chunked_prefill_enabled=False, max_num_seqs=8, max_model_len=models.SEQUENCE
    )
    defaults = loader._get_default_neuron_config(
        SimpleNamespace(dtype=torch.bfloat16),
        cache,
        SimpleNamespace(tensor_parallel_size=1),
        scheduler,
        None,
        vllm.get("speculative_config"),
    )
    merged = loader._get_neuron_config_after_override(defaults, dict(override))
    checked: dict[str, Any] = loader._validate_neuron_config(cache, scheduler, merged)
    return checked


def test_flag_reaches_the_config(
    loader: ModuleType, application: Any, model: Path, tmp_path: Path
) -> None:
    override = {**OVERRIDE, "quantized_checkpoints_path": str(tmp_path / "fp8")}

    settings = application.get_neuron_config_cls()(**neuron_config(loader, override))
    config = application.get_config_cls()(
        settings, load_config=loader.load_pretrained_config(str(model))
    )

    assert config.neuron_config.expert_wise_scale is True
    assert '"expert_wise_scale": true' in config.to_json_string()


def test_what_vllm_neuron_fills_in_is_refused_with_what_to_write(
    loader: ModuleType, application: Any, tmp_path: Path
) -> None:
    """Where ``quantization_type`` is not named, vLLM-Neuron takes ``per_tensor_symmetric``."""
    override = {
        "quantized": True,
        "quantized_checkpoints_path": str(tmp_path / "fp8"),
        "expert_wise_scale": True,
    }

    with pytest.raises(ConfigurationError, match="needs quantization_type='per_channel_symmetric'"):
        application.get_neuron_config_cls()(**neuron_config(loader, override))


def test_draft_copied_from_the_target(
    loader: ModuleType, application: Any, model: Path, tmp_path: Path
) -> None:
    """Its config is of the target's class, which in vLLM-Neuron 0.2 keeps out a dense draft."""
    draft = shutil.copytree(model, tmp_path / "draft")
    override = {**OVERRIDE, "quantized_checkpoints_path": str(tmp_path / "fp8")}
    speculation = SimpleNamespace(
        num_speculative_tokens=2,
        method="draft_model",
        draft_model_config=SimpleNamespace(model=str(draft)),
    )
    settings = application.get_neuron_config_cls()(
        **neuron_config(loader, override, speculative_config=speculation)
    )
    config = application.get_config_cls()(
        settings, load_config=loader.load_pretrained_config(str(model))
    )

    loader.NeuronModelBase._init_fused_spec_config(None, config, application, speculation)

    draft_config = config.fused_spec_config.draft_config
    assert draft_config.neuron_config.expert_wise_scale is True
    assert draft_config.neuron_config.enable_fused_speculation is False
    assert draft_config.neuron_config is not config.neuron_config


def test_compiling_makes_the_folder_once(
    loader: ModuleType,
    application: Any,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "fp8"
    override = {**OVERRIDE, "quantized_checkpoints_path": str(folder)}
    config = application.get_config_cls()(
        application.get_neuron_config_cls()(**neuron_config(loader, override)),
        load_config=loader.load_pretrained_config(str(model)),
    )
    # What follows needs the compiler and the device.
    monkeypatch.setattr(application, "compile", lambda _self, _path: None)
    monkeypatch.setattr(application, "load", lambda _self, _path: None)
    made = []
    for _ in range(2):
        loader.NeuronCausalLM._compile_and_load_model(
            SimpleNamespace(), str(model), application, config, str(tmp_path / "compiled")
        )
        made.append({path.name: path.stat().st_mtime_ns for path in folder.iterdir()})

    assert "nxdi_expertscale.json" in made[0]
    assert made[0] == made[1]
