"""The model card, as the Hugging Face hub reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from nxdi_expertscale.checkpoint import quantize_checkpoint, verify_checkpoint
from nxdi_expertscale.checkpoint.model_card import CARD, model_card
from nxdi_expertscale.cli.commands import cli
from nxdi_expertscale.errors import CheckpointError
from tests.harness import checkpoints

huggingface_hub = pytest.importorskip("huggingface_hub")

ORIGINAL = """---
license: other
license_name: "a: licence"
language:
- en
- de
tags:
- chat
---

# The original

---

Of the original.
"""


@pytest.fixture
def src(tmp_path: Path) -> Path:
    folder = checkpoints.save(tmp_path / "src")
    (folder / CARD).write_text(ORIGINAL)
    return folder


def test_metadata_is_what_the_hub_reads(src: Path, tmp_path: Path) -> None:
    dst = quantize_checkpoint(src, tmp_path / "dst").destination

    card = huggingface_hub.ModelCard(model_card(dst, "org/name", source=src))

    assert card.data.to_dict() == {
        "license": "other",
        "license_name": "a: licence",
        "language": ["en", "de"],
        "base_model": "org/name",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fp8", "compressed-tensors", "moe", "aws-neuron", "trainium"],
    }
    before, line, after = card.text.partition("\n---\n\nThe card of org/name:\n\n")
    assert line
    assert after == "# The original\n\n---\n\nOf the original.\n"
    assert "one scale for each output channel of each of the 4 experts" in before
    assert "Not vLLM on a GPU" in before


def test_it_says_how_to_make_it_again_and_what_it_costs(src: Path, tmp_path: Path) -> None:
    dst = quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=["lm_head"]).destination
    errors = verify_checkpoint(dst, src).layers

    card = model_card(dst, "org/name", revision="abc", errors=errors)

    assert "hf download org/name --revision abc --local-dir ORIGINAL" in card
    assert 'quantize ORIGINAL FP8 --modules-to-not-convert "lm_head"' in card
    assert "In full precision: `lm_head`." in card
    assert "vLLM on a GPU with FP8" in card
    for error in errors:
        assert f"| {error.layer} | {error.snr_db:.1f} dB | `{error.worst_tensor}` |" in card
    assert "The card of" not in card


def test_folder_with_its_card_is_good_and_the_card_is_printed(src: Path, tmp_path: Path) -> None:
    dst = quantize_checkpoint(src, tmp_path / "dst").destination

    result = CliRunner().invoke(
        cli, ["card", str(dst), "--base-model", "org/name@main", "--against", str(src)]
    )

    assert result.exit_code == 0
    assert "revision `main`" in result.stdout and "## Error of the weights" in result.stdout
    (dst / CARD).write_text(result.stdout)
    assert verify_checkpoint(dst, src).faults == ()


def test_folder_that_is_not_finished_has_none(src: Path) -> None:
    with pytest.raises(CheckpointError, match="was not made by"):
        model_card(src, "org/name")
