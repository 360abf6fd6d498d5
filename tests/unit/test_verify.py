from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nxdi_expertscale.checkpoint import quantize_checkpoint, read_manifest, verify_checkpoint
from nxdi_expertscale.checkpoint.digests import digest_file
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST, FileRecord
from nxdi_expertscale.errors import CheckpointError
from tests.harness import checkpoints

SHARD = "model-00001-of-00001.safetensors"
EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "src")


@pytest.fixture
def dst(src: Path, tmp_path: Path) -> Path:
    return quantize_checkpoint(src, tmp_path / "dst").destination


def faults(folder: Path, against: Path | None = None) -> dict[str, str]:
    found = verify_checkpoint(folder, against)
    return {Path(fault.where).name: fault.what for fault in found.faults}


def change(folder: Path, edit: Callable[[checkpoints.Tensors], object]) -> None:
    """Change the weights and their checksum, as a faulty quantizer would have made them."""
    values = load_file(folder / SHARD)
    edit(values)
    save_file(values, folder / SHARD)
    manifest = json.loads((folder / MANIFEST).read_text())
    shard = folder / SHARD
    record = FileRecord(SHARD, shard.stat().st_size, digest_file(shard))
    manifest["shards"] = [{"name": SHARD, "size": record.size, "blake3": record.blake3}]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_good_folder_has_no_faults(src: Path, dst: Path) -> None:
    result = verify_checkpoint(dst, src)

    assert result.faults == ()
    assert result.quantized == 2 * (4 + 12) + 1
    assert [layer.layer for layer in result.layers] == ["0", "1", "head"]
    assert all(30 < (layer.snr_db or 0) < 34 for layer in result.layers)
    assert verify_checkpoint(dst).faults == ()


def test_excluded_and_dequantized_modules_are_good(tmp_path: Path) -> None:
    values = checkpoints.by_channel(checkpoints.tensors())
    config = {"quantization_config": checkpoints.COMPRESSED_CONFIG}
    src = checkpoints.save(tmp_path / "src", values, config=config)
    quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=["layers.0"])

    result = verify_checkpoint(tmp_path / "dst", src)

    assert result.faults == ()
    assert [layer.layer for layer in result.layers] == ["1", "head"]


def test_the_worst_tensor_is_named(src: Path, dst: Path) -> None:
    change(dst, lambda values: values[f"{EXPERT}_scale"].mul_(1.5))

    layer = verify_checkpoint(dst, src).layers[0]

    assert layer.worst_tensor == EXPERT
    assert layer.worst_snr_db == pytest.approx(6, abs=0.2)


def test_a_flipped_bit_is_found(dst: Path) -> None:
    content = bytearray((dst / SHARD).read_bytes())
    content[-100] ^= 1
    (dst / SHARD).write_bytes(content)

    assert faults(dst)[SHARD].startswith("has other content")


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_a_truncated_file_is_found(dst: Path, name: str) -> None:
    content = (dst / name).read_bytes()
    (dst / name).write_bytes(content[:-1])

    assert f"has {len(content) - 1} bytes" in faults(dst)[name]


@pytest.mark.parametrize("name", [SHARD, "config.json", "model.safetensors.index.json"])
def test_a_missing_file_is_found(dst: Path, name: str) -> None:
    (dst / name).unlink()

    assert faults(dst)[name] == "is missing"


@pytest.mark.parametrize(
    ("edit", "where", "what"),
    [
        (
            lambda values: values[EXPERT].view(torch.uint8).view(-1)[5:6].fill_(0x7E),
            EXPERT,
            "beyond ±240",
        ),
        (
            lambda values: values[f"{EXPERT}_scale"][3].fill_(0.0),
            EXPERT,
            "not a positive number",
        ),
        (
            lambda values: values["model.norm.weight"][:1].fill_(torch.nan),
            "model.norm.weight",
            "has NaN",
        ),
        (
            lambda values: values.update({f"{EXPERT}_scale": values[f"{EXPERT}_scale"].half()}),
            f"{EXPERT}_scale",
            "must be F32",
        ),
        (
            lambda values: (
                values.update({EXPERT: values[EXPERT].to(torch.bfloat16), f"{EXPERT}_scale": None})
                or values.pop(f"{EXPERT}_scale")
            ),
            "dst",
            "index says it is there",
        ),
    ],
)
def test_bad_values_are_found(
    dst: Path, edit: Callable[[checkpoints.Tensors], object], where: str, what: str
) -> None:
    change(dst, edit)

    assert what in faults(dst)[where]


def test_what_must_be_quantized_and_what_must_not_is_checked(src: Path, tmp_path: Path) -> None:
    dst = quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=["lm_head"]).destination
    manifest = json.loads((dst / MANIFEST).read_text())

    (dst / MANIFEST).write_text(json.dumps({**manifest, "modules_to_not_convert": []}))
    assert faults(dst) == {"lm_head.weight": "is BF16, and must be quantized"}

    both = {**manifest, "modules_to_not_convert": ["lm_head", "layers.0.self_attn.q_proj"]}
    (dst / MANIFEST).write_text(json.dumps(both))
    assert faults(dst) == {
        "model.layers.0.self_attn.q_proj.weight": "is quantized, and must be left as it is"
    }


def test_another_source_is_found(src: Path, dst: Path, tmp_path: Path) -> None:
    values = checkpoints.tensors()
    values["model.norm.weight"] += 1
    other = checkpoints.save(tmp_path / "other", values)

    found = faults(dst, other)

    assert "has other content" in found["other"]
    assert found["model.norm.weight"] == "is not quantized, and differs from the source"


def test_a_folder_that_is_not_finished_cannot_be_verified(src: Path) -> None:
    with pytest.raises(CheckpointError, match="was not made by nxdi-expertscale quantize"):
        verify_checkpoint(src)


def test_a_manifest_cannot_name_files_elsewhere(dst: Path) -> None:
    manifest = json.loads((dst / MANIFEST).read_text())
    manifest["files"][0]["name"] = "../src/config.json"
    (dst / MANIFEST).write_text(json.dumps(manifest))

    with pytest.raises(CheckpointError, match="which is not a file of the folder"):
        read_manifest(dst)


@pytest.mark.parametrize("text", ["{}", '{"format": 1}', '{"format": 1, "source": 3}', "["])
def test_a_damaged_manifest_is_an_error(dst: Path, text: str) -> None:
    (dst / MANIFEST).write_text(text)

    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(dst)


@pytest.mark.parametrize(
    "edit",
    [
        {"modules_to_not_convert": {}},
        {"modules_to_not_convert": "lm_head"},
        {"below_floor": {"lm_head.weight": 1}},
        {"version": 1},
        {"tensors": {"kept": "3"}},
    ],
)
def test_a_manifest_with_parts_of_another_type_is_damaged(
    dst: Path, edit: dict[str, object]
) -> None:
    manifest = json.loads((dst / MANIFEST).read_text())
    (dst / MANIFEST).write_text(json.dumps(manifest | edit))

    with pytest.raises(CheckpointError, match=f"{MANIFEST}: is damaged"):
        read_manifest(dst)


class TestAgainstASource:
    """``--against`` decides: whatever is further off than FP8's own rounding is a fault."""

    @pytest.mark.parametrize(
        "name", ["lm_head.weight", "model.layers.1.mlp.experts.2.down_proj.weight"]
    )
    @pytest.mark.parametrize("part", [0.07, 0.5])
    def test_scales_that_are_off_are_told(self, tmp_path: Path, name: str, part: float) -> None:
        src = checkpoints.save(tmp_path / "src")
        dst = quantize_checkpoint(src, tmp_path / "dst").destination
        change(dst, lambda values: values[f"{name}_scale"].mul_(1 + part))

        found = faults(dst, src)

        assert "is further from the source than FP8 rounds" in found[name]

    def test_every_form_of_source_is_within_what_fp8_rounds(self, tmp_path: Path) -> None:
        for number, (form, config) in enumerate(
            [
                (checkpoints.in_blocks, checkpoints.BLOCKS_CONFIG),
                (checkpoints.by_channel, checkpoints.COMPRESSED_CONFIG),
                (checkpoints.by_tensor, checkpoints.COMPRESSED_CONFIG),
            ]
        ):
            values = form(checkpoints.tensors())
            settings = {"quantization_config": config}
            src = checkpoints.save(tmp_path / f"src{number}", values, config=settings)
            dst = quantize_checkpoint(src, tmp_path / f"dst{number}").destination
            assert verify_checkpoint(dst, src).faults == ()

    def test_heavy_tails_are_within_what_fp8_rounds(self, tmp_path: Path) -> None:
        values = checkpoints.tensors(torch.float32)
        for value in values.values():
            value.copy_(value.sign() * value.abs() ** 6 * 1e3)
        src = checkpoints.save(tmp_path / "src", values)
        dst = quantize_checkpoint(src, tmp_path / "dst").destination

        assert verify_checkpoint(dst, src).faults == ()


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        ({"version": "yesterday"}, "which is no version"),
        ({"model_type": "mixtral"}, "is of a 'mixtral'"),
        ({"tensors": {"kept": 3}}, "counts tensors of the kinds"),
        (
            {
                "tensors": {
                    "quantized experts": 23,
                    "quantized linears": 9,
                    "dequantized": 0,
                    "kept": 13,
                }
            },
            "counts 23 quantized experts, and there are 24",
        ),
        ({"below_floor": ["model.norm.weight"]}, "'model.norm.weight' is too small for FP8, which"),
        ({"source": []}, "which are those of no checkpoint"),
        (
            {
                "source": [
                    {"name": "config.json", "size": 0, "mtime_ns": 1, "digest": "ab"},
                    {"name": "model.safetensors", "size": 9, "mtime_ns": 1, "digest": "ab"},
                ]
            },
            "that is that of no file",
        ),
    ],
)
def test_a_manifest_is_held_to_what_it_describes(
    tmp_path: Path, edit: dict[str, object], what: str
) -> None:
    src = checkpoints.save(tmp_path / "src")
    dst = quantize_checkpoint(src, tmp_path / "dst").destination
    manifest = json.loads((dst / MANIFEST).read_text())
    (dst / MANIFEST).write_text(json.dumps({**manifest, **edit}))

    found = verify_checkpoint(dst).faults

    assert any(fault.where == MANIFEST and what in fault.what for fault in found), found


class TestTheFloorOfTheScale:
    """Weights so small that NxD's smallest scale loses them are told, by who sees them."""

    NAME = "model.layers.0.mlp.experts.1.up_proj.weight"

    @pytest.fixture
    def src(self, tmp_path: Path) -> Path:
        values = checkpoints.tensors()
        values[self.NAME][3] *= 1e-9
        return checkpoints.save(tmp_path / "src", values)

    def test_quantize_and_verify_and_inspect_tell_of_it(self, src: Path, tmp_path: Path) -> None:
        from nxdi_expertscale.checkpoint import inspect_checkpoint

        result = quantize_checkpoint(src, tmp_path / "dst")

        assert result.below_floor == (self.NAME,)
        against = verify_checkpoint(tmp_path / "dst", src)
        assert against.faults == ()
        assert [warning.where for warning in against.warnings] == [self.NAME]
        assert inspect_checkpoint(src).below_floor == (self.NAME,)

    def test_a_channel_of_zeros_loses_nothing(self, tmp_path: Path) -> None:
        values = checkpoints.tensors()
        values[self.NAME][3] = 0
        src = checkpoints.save(tmp_path / "src", values)

        assert quantize_checkpoint(src, tmp_path / "dst").below_floor == ()
        assert verify_checkpoint(tmp_path / "dst", src).warnings == ()

    def test_a_small_channel_that_fp8_still_holds_is_no_matter(self, tmp_path: Path) -> None:
        values = checkpoints.tensors()
        values[self.NAME][3] *= 1e-5
        src = checkpoints.save(tmp_path / "src", values)

        assert quantize_checkpoint(src, tmp_path / "dst").below_floor == ()
        assert verify_checkpoint(tmp_path / "dst", src).faults == ()


def test_folder_of_a_version_that_named_no_activations_is_good(src: Path, dst: Path) -> None:
    config = json.loads((dst / "config.json").read_text())
    del config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    (dst / "config.json").write_text(json.dumps(config))
    manifest = json.loads((dst / MANIFEST).read_text())
    for record in manifest["files"]:
        if record["name"] == "config.json":
            file = dst / "config.json"
            record |= {"size": file.stat().st_size, "blake3": digest_file(file)}
    (dst / MANIFEST).write_text(json.dumps(manifest))

    assert faults(dst, src) == {}
