from __future__ import annotations

from pathlib import Path

from nxdi_expertscale.checkpoint import neuron_settings, quantize_checkpoint
from tests.harness import checkpoints


def test_settings_name_the_folder_the_dtype_and_the_exclusions_as_checkpoint_and_nxdi_do(
    tmp_path: Path,
) -> None:
    src = checkpoints.save(tmp_path / "src")
    quantize_checkpoint(
        src, tmp_path / "dst", modules_to_not_convert=["model.layers.1.mlp.experts"]
    )

    settings = neuron_settings(tmp_path / "dst", tp_degree=4, seq_len=128)

    assert settings.override_neuron_config == {
        "quantized": True,
        "quantized_checkpoints_path": str(tmp_path / "dst"),
        "quantization_type": "per_channel_symmetric",
        "quantization_dtype": "f8e4m3",
        "expert_wise_scale": True,
        "modules_to_not_convert": ["layers.1.mlp.experts", "layers.1.mlp.expert_mlps"],
    }
    assert settings.neuron_config == {
        "tp_degree": 4,
        "seq_len": 128,
        **settings.override_neuron_config,
    }


def test_the_tied_head_is_among_them(tmp_path: Path) -> None:
    src = checkpoints.save(tmp_path / "src", config={"tie_word_embeddings": True})
    quantize_checkpoint(src, tmp_path / "dst")

    settings = neuron_settings(tmp_path / "dst")

    assert settings.neuron_config["modules_to_not_convert"] == ["lm_head"]
