"""``modules_to_not_convert``: a name holds for the checkpoint and for NxDI's modules together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nxdi_expertscale import ConfigurationError, quantize_checkpoint
from nxdi_expertscale.numerics import fp8
from tests.harness import models
from tests.harness.targets import Target

pytestmark = pytest.mark.usefixtures("active")

ROUNDING = 1e-4
QKV, OUT, HEAD = {"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"lm_head"}

NAMES: dict[str, tuple[list[str], set[str]]] = {
    "qkv_proj": (["qkv_proj"], QKV),
    "qkv": (["qkv"], QKV),
    "Wqkv": (["Wqkv"], QKV),
    "self_attn.Wqkv": (["self_attn.Wqkv"], QKV),
    "o_proj.o_proj": (["o_proj.o_proj"], OUT),
    "o_proj": (["o_proj"], OUT),
    "self_attn.q_proj": (["self_attn.q_proj"], {"q_proj"}),
    "v_proj": (["v_proj"], {"v_proj"}),
    "model.lm_head": (["model.lm_head"], HEAD),
    "self_attn": (["self_attn"], QKV | OUT),
    "model.layers": (
        [f"model.layers.{layer}.self_attn" for layer in range(models.LAYERS)],
        QKV | OUT,
    ),
}
"""For names of modules, the linear layers beside the experts that they keep in full precision."""


def settings_of(nxdi: Any, folder: Path, names: list[str], **settings: Any) -> dict[str, Any]:
    return {
        **nxdi.FP8,
        "quantized_checkpoints_path": str(folder),
        "modules_to_not_convert": [*names, nxdi.ROUTER],
        "expert_wise_scale": True,
        **settings,
    }


def modules_of(loaded: Any) -> dict[str, torch.nn.Module]:
    """The first layer's linear layers beside the experts, and the head, by their last names."""
    return {
        name.rpartition(".")[2]: module
        for name, module in loaded.module.named_modules()
        if name == "lm_head" or (name.startswith("layers.0.self_attn.") and "_proj." in name)
    }


def unquantized(loaded: Any) -> set[str]:
    return {
        name for name, module in modules_of(loaded).items() if module.weight.dtype == torch.float32
    }


def check_model(nxdi: Any, moe: Path, folder: Path, loaded: Any) -> None:
    """Compare a whole model with Hugging Face's on the values that the checkpoint stands for."""
    stored = {
        name.removeprefix("model.").replace(".weight_scale", ".scale"): tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    reference = models.load(moe)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            key = name.removeprefix("model.")
            scale = stored.get(key.removesuffix("weight") + "scale", torch.ones(1))
            parameter.copy_(fp8.dequantize(stored[key], scale))
        logits = reference(models.prompt()).logits[:, -1]
    assert nxdi.relative_error(loaded.logits(models.prompt()), logits) < ROUNDING


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_either_naming_holds_for_both(
    nxdi: Any, moe: Path, tmp_path: Path, name: str
) -> None:
    names, kept = NAMES[name]
    quantize_checkpoint(moe, tmp_path / "fp8", modules_to_not_convert=names)

    loaded = nxdi.load(moe, **settings_of(nxdi, tmp_path / "fp8", names))

    assert unquantized(loaded) == kept
    check_model(nxdi, moe, tmp_path / "fp8", loaded)


@pytest.mark.parametrize("name", ["qkv_proj", "o_proj.o_proj", "model.layers", "v_proj"])
@pytest.mark.parametrize("flag", [True, False])
def test_a_name_holds_for_nxdis_own_step_as_well(
    nxdi: Any, moe: Path, tmp_path: Path, name: str, flag: bool
) -> None:
    names, kept = NAMES[name]
    folder = tmp_path / "fp8"
    folder.mkdir()
    settings = {**settings_of(nxdi, folder, names), "expert_wise_scale": False}
    config = nxdi.inference_config(moe, **settings)
    nxdi.application_cls(moe).save_quantized_state_dict(str(moe), config)

    loaded = nxdi.load(moe, **{**settings, "expert_wise_scale": flag})

    assert config.neuron_config.modules_to_not_convert == [*names, nxdi.ROUTER]
    assert unquantized(loaded) == kept
    if flag:
        check_model(nxdi, moe, folder, loaded)


@pytest.mark.parametrize("name", ["self_attn", "model.layers", "qkv_proj", "Wqkv", "o_proj"])
def test_a_name_holds_where_queries_keys_and_values_are_fused(
    nxdi: Any, target: Target, moe: Path, tmp_path: Path, name: str
) -> None:
    if target.version < (0, 6):
        pytest.skip("this release cannot fuse the QKV weights of a Qwen3 MoE")
    names, kept = NAMES[name]
    quantize_checkpoint(moe, tmp_path / "fp8", modules_to_not_convert=names)

    loaded = nxdi.load(moe, **settings_of(nxdi, tmp_path / "fp8", names, fused_qkv=True))

    expected = (kept - QKV) | ({"Wqkv"} if kept & QKV else set())
    assert unquantized(loaded) == expected
    check_model(nxdi, moe, tmp_path / "fp8", loaded)


@pytest.mark.parametrize("flag", [True, False])
def test_a_part_of_what_is_fused_is_refused_when_the_config_is_made(
    nxdi: Any, moe: Path, tmp_path: Path, flag: bool
) -> None:
    settings = settings_of(
        nxdi, tmp_path, ["self_attn.q_proj"], fused_qkv=True, expert_wise_scale=flag
    )

    with pytest.raises(ConfigurationError, match=r"name all of .*or set fused_qkv=False"):
        nxdi.inference_config(moe, **settings)


@pytest.mark.parametrize("flag", [True, False])
def test_a_text_in_place_of_a_list_is_refused_when_the_config_is_made(
    nxdi: Any, moe: Path, tmp_path: Path, flag: bool
) -> None:
    settings = settings_of(nxdi, tmp_path, [], expert_wise_scale=flag)

    with pytest.raises(ConfigurationError, match=r"write a list: modules_to_not_convert=\['lm_"):
        nxdi.inference_config(moe, **{**settings, "modules_to_not_convert": "lm_head"})


def test_a_name_that_no_module_has_is_refused_when_the_checkpoint_is_made_and_when_it_is_loaded(
    nxdi: Any, moe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fp8"
    settings = settings_of(nxdi, folder, ["self_atn"])
    config = nxdi.inference_config(moe, **settings)
    message = r"'self_atn' is no part of any module's name; did you mean 'self_attn'"

    with pytest.raises(ConfigurationError, match=message):
        nxdi.application_cls(moe).save_quantized_state_dict(str(moe), config)
    assert not folder.exists()
    quantize_checkpoint(moe, folder)
    with pytest.raises(ConfigurationError, match=message):
        nxdi.convert(moe, **settings)


def test_attention_that_is_quantized_in_the_checkpoint_alone_is_refused(
    nxdi: Any, moe: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(moe, tmp_path / "fp8")

    with pytest.raises(
        ConfigurationError, match=r"self_attn\.[qkv]_proj\.weight: it is quantized in the check"
    ):
        nxdi.load(moe, **settings_of(nxdi, tmp_path / "fp8", ["qkv_proj"]))
