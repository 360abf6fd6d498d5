"""The model card, as the Hugging Face hub reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from nxdi_expertscale.checkpoint import quantize_checkpoint, verify_checkpoint
from nxdi_expertscale.checkpoint.model_card import BaseModel, find_base_model, model_card
from nxdi_expertscale.checkpoint.write.staging import CARD
from nxdi_expertscale.cli.commands import cli
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.sources.folder import Folder
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


COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_quantize_writes_one_that_may_be_edited(src: Path, tmp_path: Path) -> None:
    dst = quantize_checkpoint(src, tmp_path / "dst").destination
    written = (Path(dst) / CARD).read_text()
    card = huggingface_hub.ModelCard.load(Path(dst) / CARD)

    assert card.data.license == "other" and card.data.tags[0] == "fp8"
    assert card.data.base_model is None
    assert card.text.lstrip().startswith("# qwen3_moe in FP8, one scale per expert\n")
    assert card.text.endswith(
        "The card of the original model:\n\n# The original\n\n---\n\nOf the original.\n"
    )
    assert str(tmp_path) not in written
    (Path(dst) / CARD).write_text("mine")
    assert verify_checkpoint(dst, src).faults == ()
    quantize_checkpoint(src, dst, overwrite=True)
    assert (Path(dst) / CARD).read_text() == written


def errors_in(card: str) -> dict[str, float]:
    rows = [row.split(" | ") for row in card.splitlines() if row.endswith(" dB |")]
    return {row[0].removeprefix("| "): float(row[1].removesuffix(" dB")) for row in rows}


def test_errors_are_those_that_verify_measures_over_all_rows(src: Path, tmp_path: Path) -> None:
    dst = quantize_checkpoint(src, tmp_path / "dst", max_shard_bytes=20_000).destination

    found = errors_in((Path(dst) / CARD).read_text())

    measured = {error.layer: error.snr_db for error in verify_checkpoint(dst, src).layers}
    assert found.keys() == measured.keys()
    for layer, snr in measured.items():
        # Of weights as small as these, a sixteenth is a few rows.
        assert found[layer] == pytest.approx(snr, abs=1)


def test_what_is_not_rounded_has_no_error(tmp_path: Path) -> None:
    source = checkpoints.save(tmp_path / "src")
    fp8 = quantize_checkpoint(source, tmp_path / "fp8").destination

    again = quantize_checkpoint(fp8, tmp_path / "again").destination

    # Below the line is the card of the first.
    own = (Path(again) / CARD).read_text().partition("\nThe card of")[0]
    assert "## How it was made" in own and "## Error of the weights" not in own


def test_card_of_a_run_that_was_cut_off_is_that_of_one_that_was_not(
    src: Path, tmp_path: Path
) -> None:
    whole = quantize_checkpoint(src, tmp_path / "whole" / "dst", max_shard_bytes=20_000).destination

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise StopError

    cut = tmp_path / "cut" / "dst"
    with pytest.raises(StopError):
        quantize_checkpoint(src, cut, max_shard_bytes=20_000, workers=1, progress=stop)
    assert quantize_checkpoint(src, cut, max_shard_bytes=20_000).resumed_shards > 0

    assert (cut / CARD).read_text() == (Path(whole) / CARD).read_text()


def test_base_model_is_found_where_something_says_it(tmp_path: Path) -> None:
    cached = tmp_path / "models--org--my--name" / "snapshots" / COMMIT
    cached.mkdir(parents=True)
    downloaded = tmp_path / "name"
    (downloaded / ".cache/huggingface/download").mkdir(parents=True)
    metadata = downloaded / ".cache/huggingface/download/config.json.metadata"
    metadata.write_text(f"{COMMIT}\netag\n1.5\n")
    of_hub = Folder(cached, origin=f"hf://org/name@{COMMIT}")

    assert find_base_model(of_hub) == BaseModel("org/name", COMMIT)
    assert find_base_model(Folder(cached)) == BaseModel("org/my--name", COMMIT)
    assert find_base_model(Folder(downloaded)) == BaseModel(None, COMMIT)
    metadata.write_bytes(b"\xff no commit")
    assert find_base_model(Folder(downloaded)) == BaseModel(None, None)


def test_long_card_is_refused_before_the_work(src: Path, tmp_path: Path) -> None:
    with (src / CARD).open("ab") as file:
        file.truncate(9 << 20)

    with pytest.raises(CheckpointError, match=r"README\.md"):
        quantize_checkpoint(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
