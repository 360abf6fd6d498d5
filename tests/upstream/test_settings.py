"""What a config asks for is judged whenever it is looked at, before NxDI fails or averages."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nxdi_expertscale import ConfigurationError, quantize_checkpoint
from tests.harness import models
from tests.harness.targets import Target

pytestmark = pytest.mark.usefixtures("active")

FLAG = "expert_wise_scale"


@pytest.fixture(scope="module")
def folder(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished FP8 folder of the model."""
    path = tmp_path_factory.mktemp("settings") / "fp8"
    quantize_checkpoint(moe, path)
    return path


@pytest.fixture
def fp8(nxdi: Any, folder: Path) -> dict[str, Any]:
    return {
        **nxdi.FP8,
        "quantized_checkpoints_path": str(folder),
        "modules_to_not_convert": [nxdi.ROUTER],
        FLAG: True,
    }


def changed_application(nxdi: Any, moe: Path, fp8: dict[str, Any], value: object) -> Any:
    """An application whose configs were changed by attribute after they were made."""
    application = nxdi.application_cls(moe)(str(moe), nxdi.inference_config(moe, **fp8))
    for config in (application.config, *(graph.config for graph in application.models)):
        setattr(config.neuron_config, FLAG, value)
    return application


@pytest.mark.parametrize("value", ["true", 1, None])
@pytest.mark.parametrize("moment", ["save", "convert", "load module", "make the config"])
def test_flag_that_is_no_boolean_by_attribute_is_refused_at_every_later_moment(
    nxdi: Any, moe: Path, fp8: dict[str, Any], value: object, moment: str
) -> None:
    application = changed_application(nxdi, moe, fp8, value)
    graph = application.models[0]

    with pytest.raises(ConfigurationError, match=f"must be true or false, not {value!r}"):
        if moment == "save":
            application.save_quantized_state_dict(str(moe), application.config)
        elif moment == "convert":
            application.checkpoint_loader_fn()
        elif moment == "load module":
            module = graph.get_model_instance()
            module.load_module()
        else:
            type(application.config)(
                application.config.neuron_config, load_config=nxdi.load_pretrained_config(str(moe))
            )


def test_flag_of_a_draft_counts_when_its_modules_are_converted(
    nxdi: Any, moe: Path, fp8: dict[str, Any]
) -> None:
    """A draft is a model of its own within the target's, and its config is looked at as well."""
    from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig

    application_cls = nxdi.application_cls(moe)
    config, draft = nxdi.configs_of_a_pair(moe, **fp8)
    setattr(draft.neuron_config, FLAG, 1)
    config.fused_spec_config = FusedSpecNeuronConfig(
        application_cls._model_cls, draft_config=draft, draft_model_path=str(moe)
    )
    before = application_cls._FUSED_PREFIX, application_cls._model_cls
    try:
        with pytest.raises(ConfigurationError, match="must be true or false, not 1"):
            nxdi.load_application(application_cls(str(moe), config))
    finally:
        application_cls._FUSED_PREFIX, application_cls._model_cls = before


@pytest.mark.parametrize("value", [True, False])
def test_flag_on_the_models_config_is_refused(
    nxdi: Any, moe: Path, fp8: dict[str, Any], value: bool
) -> None:
    for flag in (True, False):
        config = nxdi.inference_config(moe, **{**fp8, FLAG: flag})
        with pytest.raises(ConfigurationError, match=r"set on the model's config .*qwen3_moe"):
            type(config)(
                config.neuron_config,
                load_config=nxdi.load_pretrained_config(str(moe)),
                **{FLAG: value},
            )
        setattr(config, FLAG, value)
        application = nxdi.application_cls(moe)(str(moe), config)
        with pytest.raises(ConfigurationError, match="set on the model's config"):
            application.checkpoint_loader_fn()


@pytest.mark.parametrize("quantized", [True, False])
def test_plain_neuron_config_is_refused_for_a_model_with_experts(
    nxdi: Any, moe: Path, fp8: dict[str, Any], quantized: bool
) -> None:
    from neuronx_distributed_inference.models.config import NeuronConfig

    settings = {**fp8, "quantized": quantized}
    plain = NeuronConfig(batch_size=1, seq_len=models.SEQUENCE, **settings)

    with pytest.raises(
        ConfigurationError, match=r"needs a MoENeuronConfig .* finds a NeuronConfig"
    ):
        nxdi.application_cls(moe).get_config_cls()(
            plain, load_config=nxdi.load_pretrained_config(str(moe))
        )


@pytest.mark.parametrize("value", ["true", 1])
def test_flag_that_is_no_boolean_is_refused_on_a_plain_neuron_config(
    nxdi: Any, value: object
) -> None:
    from neuronx_distributed_inference.models.config import NeuronConfig

    with pytest.raises(ConfigurationError, match="must be true or false"):
        NeuronConfig(batch_size=1, seq_len=models.SEQUENCE, **{FLAG: value})


@pytest.mark.parametrize(
    "setting",
    [{"quantized_mlp_kernel_enabled": True}, {"activation_quantization_type": "dynamic"}],
    ids=str,
)
def test_quantized_layers_without_a_quantized_checkpoint_are_refused(
    nxdi: Any, moe: Path, fp8: dict[str, Any], setting: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match=r"quantized=False beside .*; set quantized=True"):
        nxdi.inference_config(moe, **{**fp8, **setting, "quantized": False})

    nxdi.inference_config(moe, **fp8, **setting)


def test_exclusions_in_one_string_are_refused(nxdi: Any, moe: Path, fp8: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"write a list: .*=\['mlp.gate'\]"):
        nxdi.inference_config(moe, **{**fp8, "modules_to_not_convert": "mlp.gate"})


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), None], ids=str)
@pytest.mark.parametrize("fused_qkv", [False, True])
def test_scales_of_attention_in_other_forms_give_the_same_model(
    nxdi: Any,
    target: Target,
    moe: Path,
    folder: Path,
    fp8: dict[str, Any],
    tmp_path: Path,
    shape: tuple[int, ...] | None,
    fused_qkv: bool,
) -> None:
    """One number for a whole tensor, or a row of them (None), in place of ``[out, 1]``."""
    if fused_qkv and target.version < (0, 6):
        pytest.skip("this release does not fuse a Qwen3 MoE's attention")
    logits = []
    for form in ("as written", "for each channel"):
        path = tmp_path / form
        shutil.copytree(folder, path)
        # What is loaded is another checkpoint than the manifest's.
        (path / "nxdi_expertscale.json").unlink()
        for file in path.glob("*.safetensors"):
            tensors = load_file(file)
            for name, scale in tensors.items():
                if "self_attn" in name and name.endswith("_scale"):
                    tensors[name] = another_form(scale, shape, whole=form == "as written")
            save_file(tensors, file, {"format": "pt"})
        settings = {**fp8, "quantized_checkpoints_path": str(path), "fused_qkv": fused_qkv}
        logits.append(nxdi.load(moe, **settings).logits(models.prompt()))

    assert torch.equal(*logits)


def another_form(
    scale: torch.Tensor, shape: tuple[int, ...] | None, *, whole: bool
) -> torch.Tensor:
    if shape is None:
        return scale.flatten().clone() if whole else scale
    first = scale[0, 0]
    return first.reshape(shape).clone() if whole else first.expand_as(scale).contiguous()
