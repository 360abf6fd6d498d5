from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale.checkpoint import quantize_checkpoint, verify_checkpoint
from nxdi_expertscale.checkpoint.read import chunks
from nxdi_expertscale.checkpoint.write.folder_staging import FolderStaging
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST
from nxdi_expertscale.checkpoint.write.pinned_folder import PinnedFolder
from nxdi_expertscale.checkpoint.write.staging import WORK
from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from nxdi_expertscale.numerics import fp8
from tests.harness import checkpoints

INDEX = "model.safetensors.index.json"
SMALL = 20_000
"""A size of shards of which the checkpoint takes several."""


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "src")


def quantized_by_hand(values: checkpoints.Tensors) -> checkpoints.Tensors:
    """What NxD's step makes of the values, with the router left as it is."""
    found: checkpoints.Tensors = {}
    for name, value in values.items():
        if not checkpoints.is_linear(name):
            found[name] = value
            continue
        values32 = value.float()
        scale = torch.max(values32.abs().amax(1, keepdim=True) / 240, torch.tensor(1e-5))
        quantized = (values32 / scale).clamp(-240, 240).to(torch.float8_e4m3fn)
        found[name] = quantized
        found[f"{name}_scale"] = scale
    return found


def assert_same(found: checkpoints.Tensors, expected: checkpoints.Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_floats_become_what_nxd_makes_of_them(
    tmp_path: Path, dtype: torch.dtype, shards: int
) -> None:
    values = checkpoints.tensors(dtype)
    checkpoints.save(tmp_path / "src", values, shards=shards)

    quantize_checkpoint(tmp_path / "src", tmp_path / "dst")

    assert_same(checkpoints.load(tmp_path / "dst"), quantized_by_hand(values))


def dequantized(values: checkpoints.Tensors) -> checkpoints.Tensors:
    """The values that a quantized checkpoint means, in float32 where they are quantized."""
    found: checkpoints.Tensors = {}
    for name, value in values.items():
        if f"{name}_scale_inv" in values:
            scale = values[f"{name}_scale_inv"]
            for axis in (0, 1):
                scale = scale.repeat_interleave(checkpoints.BLOCK, dim=axis)
            found[name] = value.float() * scale[: value.shape[0], : value.shape[1]]
        elif f"{name}_scale" in values:
            found[name] = value.float() * values[f"{name}_scale"].float()
        elif not name.endswith(("_scale", "_scale_inv")):
            found[name] = value
    return found


def test_fp8_in_blocks_is_rounded_once_from_the_values_that_it_means(tmp_path: Path) -> None:
    values = checkpoints.in_blocks(checkpoints.tensors())
    config = {"quantization_config": checkpoints.BLOCKS_CONFIG}
    checkpoints.save(tmp_path / "src", values, config=config)

    quantize_checkpoint(tmp_path / "src", tmp_path / "dst")

    found = checkpoints.load(tmp_path / "dst")
    assert_same(found, quantized_by_hand(dequantized(values)))
    assert not any(fp8.exceeds_range(v) for v in found.values() if v.dtype == torch.float8_e4m3fn)


@pytest.mark.parametrize("form", [checkpoints.by_channel, checkpoints.by_tensor])
def test_fp8_by_channel_or_tensor_loses_nothing_but_the_last_bit_of_the_smallest_values(
    tmp_path: Path, form: Callable[..., checkpoints.Tensors]
) -> None:
    values = form(checkpoints.tensors())
    config = {"quantization_config": checkpoints.COMPRESSED_CONFIG}
    checkpoints.save(tmp_path / "src", values, config=config)

    quantize_checkpoint(tmp_path / "src", tmp_path / "dst")

    found = checkpoints.load(tmp_path / "dst")
    for name, value in values.items():
        if f"{name}_scale" not in values:
            continue
        scale = found[f"{name}_scale"]
        assert torch.equal(scale, values[f"{name}_scale"].float().expand_as(scale) * 2), name
        assert torch.equal(found[name].float(), (value.float() / 2).to(value.dtype).float()), name
        exact = value.float().abs() >= 2**-5
        assert torch.equal(found[name].float()[exact] * 2, value.float()[exact]), name
        assert not fp8.exceeds_range(found[name]), name


def test_fp8_by_channel_within_neurons_range_stays_as_it_is(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "src")
    quantize_checkpoint(tmp_path / "src", tmp_path / "once")
    quantize_checkpoint(tmp_path / "once", tmp_path / "twice")

    assert_same(checkpoints.load(tmp_path / "twice"), checkpoints.load(tmp_path / "once"))


@pytest.mark.parametrize("form", [checkpoints.by_channel, checkpoints.by_tensor])
def test_nan_in_fp8_is_refused(tmp_path: Path, form: Callable[..., checkpoints.Tensors]) -> None:
    values = form(checkpoints.tensors())
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    values[name].view(torch.uint8)[3, 5] = 0xFF
    config = {"quantization_config": checkpoints.COMPRESSED_CONFIG}
    checkpoints.save(tmp_path / "src", values, config=config)

    with pytest.raises(CheckpointError, match=rf"{name}.*NaN"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst")


def test_scales_of_channels_may_have_one_dimension(tmp_path: Path) -> None:
    values = checkpoints.by_channel(checkpoints.tensors())
    config = {"quantization_config": checkpoints.COMPRESSED_CONFIG}
    checkpoints.save(tmp_path / "two", values, config=config)
    flat = {n: v.flatten() if n.endswith("_scale") else v for n, v in values.items()}
    checkpoints.save(tmp_path / "one", flat, config=config)

    for name in ("one", "two"):
        quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-fp8")

    assert_same(checkpoints.load(tmp_path / "one-fp8"), checkpoints.load(tmp_path / "two-fp8"))


def test_a_quantized_router_and_excluded_experts_are_dequantized(tmp_path: Path) -> None:
    values = checkpoints.tensors()
    router = "model.layers.0.mlp.gate"
    scale = values[f"{router}.weight"].float().abs().amax(1, keepdim=True) / 240
    quantized = (values[f"{router}.weight"].float() / scale).to(torch.float8_e4m3fn)
    values |= checkpoints.by_channel(values)
    values |= {f"{router}.weight": quantized, f"{router}.weight_scale": scale}
    config = {"quantization_config": checkpoints.COMPRESSED_CONFIG}
    checkpoints.save(tmp_path / "src", values, config=config)

    result = quantize_checkpoint(
        tmp_path / "src", tmp_path / "dst", modules_to_not_convert=["layers.1.mlp.experts"]
    )

    found = checkpoints.load(tmp_path / "dst")
    expert = "model.layers.1.mlp.experts.2.up_proj"
    means = dequantized(values)
    for name in (f"{router}.weight", f"{expert}.weight"):
        assert f"{name}_scale" not in found
        assert torch.equal(found[name], means[name].to(torch.bfloat16))
    assert result.tensors["dequantized"] == 1 + 3 * checkpoints.EXPERTS


def test_each_kind_of_tensor_is_counted(src: Path, tmp_path: Path) -> None:
    result = quantize_checkpoint(src, tmp_path / "dst")

    linears = 4 * checkpoints.LAYERS + 1
    experts = 3 * checkpoints.LAYERS * checkpoints.EXPERTS
    assert result.tensors == {
        "quantized experts": experts,
        "quantized linears": linears,
        "dequantized": 0,
        "kept": len(checkpoints.tensors()) - linears - experts,
    }
    assert result.source_bytes == sum(p.stat().st_size for p in src.glob("*.safetensors"))
    assert result.output_bytes == sum(
        p.stat().st_size for p in (tmp_path / "dst").glob("*.safetensors")
    )


@pytest.mark.parametrize("name", ["layers.0.mlp.experts", "model.layers.0.mlp.expert_mlps"])
def test_experts_named_as_in_the_checkpoint_or_as_in_nxdi_are_left_as_they_are(
    src: Path, tmp_path: Path, name: str
) -> None:
    quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=[name])

    found = checkpoints.load(tmp_path / "dst")
    for tensor, value in checkpoints.tensors().items():
        if "layers.0.mlp.experts" in tensor:
            assert torch.equal(found[tensor], value)
        elif checkpoints.is_linear(tensor):
            assert found[tensor].dtype == torch.float8_e4m3fn


def test_a_tied_head_is_left_as_it_is(tmp_path: Path) -> None:
    values = checkpoints.tensors()
    del values["lm_head.weight"]
    checkpoints.save(tmp_path / "src", values, config={"tie_word_embeddings": True})

    result = quantize_checkpoint(tmp_path / "src", tmp_path / "dst")

    assert result.modules_to_not_convert == ("lm_head",)
    assert "lm_head.weight" not in checkpoints.load(tmp_path / "dst")


def test_a_name_that_no_module_has_is_refused(src: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'layers\.7\.mlp' is no part of any .*'layers"):
        quantize_checkpoint(
            src, tmp_path / "dst", modules_to_not_convert=["self_attn", "layers.7.mlp"]
        )

    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("name", ["qkv_proj", "qkv", "Wqkv", "layers.0.self_attn.qkv_proj"])
def test_a_name_of_nxdis_modules_keeps_the_checkpoints_tensors(
    src: Path, tmp_path: Path, name: str
) -> None:
    quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=[name])

    found = checkpoints.load(tmp_path / "dst")
    for letter in "qkv":
        tensor = f"model.layers.0.self_attn.{letter}_proj.weight"
        assert found[tensor].dtype == torch.bfloat16
        assert f"{tensor}_scale" not in found
    assert found["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn


def test_the_output_does_not_depend_on_the_workers(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for workers in (1, 2, 7):
        quantize_checkpoint(src, tmp_path / str(workers), workers=workers, max_shard_bytes=SMALL)

    assert checkpoints.contents(tmp_path / "1") == checkpoints.contents(tmp_path / "2")
    assert checkpoints.contents(tmp_path / "1") == checkpoints.contents(tmp_path / "7")


def test_the_weights_do_not_depend_on_the_size_of_chunks(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_checkpoint(src, tmp_path / "whole")
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 7 * checkpoints.HIDDEN)
    quantize_checkpoint(src, tmp_path / "chunks")

    assert_same(checkpoints.load(tmp_path / "chunks"), checkpoints.load(tmp_path / "whole"))


def test_the_folder_has_all_that_belongs_to_a_checkpoint(src: Path, tmp_path: Path) -> None:
    (src / "pytorch_model.bin").write_bytes(b"\x80")
    (src / "README.md").write_text("the source's")

    quantize_checkpoint(src, tmp_path / "dst", max_shard_bytes=SMALL)

    names = {path.name for path in (tmp_path / "dst").iterdir()}
    index = json.loads((tmp_path / "dst" / INDEX).read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert names == shards | {
        INDEX,
        "README.md",
        "config.json",
        "generation_config.json",
        "nxdi_expertscale.json",
        "tokenizer.json",
    }
    assert (tmp_path / "dst/tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()


def test_the_config_says_how_the_weights_are_quantized(src: Path, tmp_path: Path) -> None:
    quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=["layers.0.mlp.experts"])

    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == checkpoints.CONFIG
    assert settings["quant_method"] == "compressed-tensors"
    group = settings["config_groups"]["group_0"]
    assert {kind: group[kind]["strategy"] for kind in ("weights", "input_activations")} == {
        "weights": "channel",
        "input_activations": "token",
    }
    assert group["input_activations"]["dynamic"] is True
    assert settings["ignore"] == [
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
        *(
            rf"re:^model\.layers\.0\.mlp\.experts\.\d+\.{projection}$"
            for projection in ("down_proj", "gate_proj", "up_proj")
        ),
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"]
)
def test_values_that_are_no_numbers_are_refused_and_nothing_is_left(
    tmp_path: Path, name: str, bad: float
) -> None:
    values = checkpoints.tensors()
    values[name].view(-1)[-1] = bad
    checkpoints.save(tmp_path / "src", values)

    with pytest.raises(CheckpointError, match=f"{name}: has NaN or infinity"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "new" / "dst")

    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_of_the_source_have_to_be_positive_numbers(tmp_path: Path, bad: float) -> None:
    values = checkpoints.in_blocks(checkpoints.tensors())
    values["lm_head.weight_scale_inv"][1, 1] = bad
    config = {"quantization_config": checkpoints.BLOCKS_CONFIG}
    checkpoints.save(tmp_path / "src", values, config=config)

    with pytest.raises(CheckpointError, match=r"lm_head\.weight_scale_inv: has a scale that is"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst")


class TestDestination:
    def test_a_finished_folder_is_not_overwritten(self, src: Path, tmp_path: Path) -> None:
        quantize_checkpoint(src, tmp_path / "dst")
        before = checkpoints.contents(tmp_path / "dst")

        with pytest.raises(CheckpointError, match="is a finished checkpoint"):
            quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=["lm_head"])

        assert checkpoints.contents(tmp_path / "dst") == before

    def test_overwriting_replaces_ours_and_leaves_what_is_not_ours(
        self, src: Path, tmp_path: Path
    ) -> None:
        quantize_checkpoint(src, tmp_path / "dst", max_shard_bytes=SMALL)
        (tmp_path / "dst" / "notes.md").write_text("mine")
        quantize_checkpoint(src, tmp_path / "new", modules_to_not_convert=["lm_head"])

        quantize_checkpoint(
            src, tmp_path / "dst", modules_to_not_convert=["lm_head"], overwrite=True
        )

        found = checkpoints.contents(tmp_path / "dst")
        assert found.pop("notes.md") == b"mine"
        assert found == checkpoints.contents(tmp_path / "new")

    def test_an_old_folder_stays_when_the_new_one_fails(self, src: Path, tmp_path: Path) -> None:
        quantize_checkpoint(src, tmp_path / "dst")
        before = checkpoints.contents(tmp_path / "dst")
        values = checkpoints.tensors()
        values["model.norm.weight"][0] = torch.nan
        checkpoints.save(tmp_path / "bad", values)

        with pytest.raises(CheckpointError, match="has NaN"):
            quantize_checkpoint(tmp_path / "bad", tmp_path / "dst", overwrite=True)

        assert checkpoints.contents(tmp_path / "dst") == before

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_with_other_things_is_left_alone(
        self, src: Path, tmp_path: Path, overwrite: bool
    ) -> None:
        (tmp_path / "dst").mkdir()
        (tmp_path / "dst" / "thesis.tex").write_text("years of work")

        with pytest.raises(CheckpointError, match="was not made by nxdi-expertscale"):
            quantize_checkpoint(src, tmp_path / "dst", overwrite=overwrite)

        assert checkpoints.contents(tmp_path / "dst") == {"thesis.tex": b"years of work"}

    def test_an_empty_folder_is_filled(self, src: Path, tmp_path: Path) -> None:
        (tmp_path / "dst").mkdir()

        quantize_checkpoint(src, tmp_path / "dst")

        assert (tmp_path / "dst" / INDEX).is_file()

    def test_the_source_is_not_its_own_destination(self, src: Path, tmp_path: Path) -> None:
        before = checkpoints.contents(src)
        (tmp_path / "link").symlink_to(src)

        for dst in (src, tmp_path / "link"):
            with pytest.raises(CheckpointError, match="is the source itself"):
                quantize_checkpoint(src, dst, overwrite=True)

        assert checkpoints.contents(src) == before

    def test_the_users_home_is_known(
        self, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)

        quantize_checkpoint(f"~/{src.relative_to(tmp_path)}", "~/dst")

        assert verify_checkpoint("~/dst").faults == ()
        assert (tmp_path / "dst" / INDEX).is_file()
        assert not (tmp_path / "~").exists()

    @pytest.mark.parametrize("place", ["loop", "loop/dst", "nul\0", "~nobody-of-this-name/dst"])
    def test_what_leads_nowhere_is_not_a_destination(
        self, src: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "loop").symlink_to("loop")

        with pytest.raises(CheckpointError, match=r"no folder can be there|loop"):
            quantize_checkpoint(src, place)

    def test_a_file_is_not_a_destination(self, src: Path, tmp_path: Path) -> None:
        (tmp_path / "dst").write_text("")

        with pytest.raises(CheckpointError, match="is a file; name a folder"):
            quantize_checkpoint(src, tmp_path / "dst")

    def test_too_little_space_is_refused_before_anything_is_written(
        self, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

        with pytest.raises(CheckpointError, match=r"needs [\d.]+ kB and 1\.0 kB are free"):
            quantize_checkpoint(src, tmp_path / "dst")

        assert not (tmp_path / "dst").exists()

    def test_a_second_run_says_that_it_is_the_second(self, src: Path, tmp_path: Path) -> None:
        with (
            FolderStaging(tmp_path / "dst"),
            pytest.raises(CheckpointError, match="another run is writing to it"),
        ):
            quantize_checkpoint(src, tmp_path / "dst")

        quantize_checkpoint(src, tmp_path / "dst")


class TestGoingOn:
    def test_finished_shards_are_used_again(self, src: Path, tmp_path: Path) -> None:
        quantize_checkpoint(src, tmp_path / "undisturbed", max_shard_bytes=SMALL)

        def fill_disk(done: int, total: int) -> None:
            if done > 0.7 * total:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "dst")

        with pytest.raises(CheckpointError, match="the disk is full; free some space"):
            quantize_checkpoint(src, tmp_path / "dst", max_shard_bytes=SMALL, progress=fill_disk)

        assert [path.name for path in (tmp_path / "dst").iterdir()] == [WORK]
        kept = {path.name for path in (tmp_path / "dst" / WORK).glob("*.safetensors")}
        result = quantize_checkpoint(src, tmp_path / "dst", max_shard_bytes=SMALL)
        assert 0 < result.resumed_shards == len(kept) < result.shards
        undisturbed = checkpoints.contents(tmp_path / "undisturbed")
        assert checkpoints.contents(tmp_path / "dst") == undisturbed

    def test_a_source_that_was_mended_is_not_done_all_over_again(self, tmp_path: Path) -> None:
        values = checkpoints.tensors()
        checkpoints.save(tmp_path / "src", values)
        last = sorted((tmp_path / "src").glob("*.safetensors"))[-1]
        good = last.read_bytes()
        last.write_bytes(good[:-2] + b"\xff\x7f")  # NaN in the last tensor
        with pytest.raises(CheckpointError, match="has NaN"):
            quantize_checkpoint(
                tmp_path / "src", tmp_path / "dst", workers=1, max_shard_bytes=SMALL
            )

        last.write_bytes(good)
        result = quantize_checkpoint(tmp_path / "src", tmp_path / "dst", max_shard_bytes=SMALL)

        assert result.resumed_shards > 0
        assert_same(checkpoints.load(tmp_path / "dst"), quantized_by_hand(values))

    def test_nothing_of_another_request_is_used(self, src: Path, tmp_path: Path) -> None:
        def stop_late(done: int, total: int) -> None:
            if done == total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(src, tmp_path / "dst", max_shard_bytes=SMALL, progress=stop_late)
        assert list((tmp_path / "dst" / WORK).glob("*.record"))
        excluded = {"modules_to_not_convert": ["self_attn"], "max_shard_bytes": SMALL}

        result = quantize_checkpoint(src, tmp_path / "dst", **excluded)

        quantize_checkpoint(src, tmp_path / "undisturbed", **excluded)
        assert result.resumed_shards == 0
        undisturbed = checkpoints.contents(tmp_path / "undisturbed")
        assert checkpoints.contents(tmp_path / "dst") == undisturbed

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_run_cut_off_while_files_are_moved_is_completed(
        self, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
    ) -> None:
        """At each single step of the move: afterwards it loads as one of the two, or not at all."""
        settings: dict[str, Any] = {"max_shard_bytes": SMALL, "modules_to_not_convert": ["lm_head"]}
        quantize_checkpoint(src, tmp_path / "new", **settings)
        new = checkpoints.contents(tmp_path / "new")
        for step in range(100):
            dst = tmp_path / f"dst{step}"
            if overwrite:
                quantize_checkpoint(src, dst, max_shard_bytes=SMALL)
            old = checkpoints.contents(dst) if overwrite else {}
            with monkeypatch.context() as patched:
                cut_off_at(step, dst, patched)
                try:
                    quantize_checkpoint(src, dst, overwrite=overwrite, **settings)
                except _CutOffError:
                    finished = False
                else:
                    finished = True
            found = {n: c for n, c in checkpoints.contents(dst).items() if not n.startswith(WORK)}
            if INDEX in found:
                assert is_part_of(found, new) or is_part_of(found, old)
            if finished:
                break
            # Without --overwrite: what is complete is the result of the run that was cut off.
            quantize_checkpoint(src, dst, overwrite=overwrite and INDEX in found, **settings)
            assert checkpoints.contents(dst) == new
        else:
            pytest.fail("the run never finished")
        assert step > 5

    def test_a_damaged_shard_is_written_again(self, src: Path, tmp_path: Path) -> None:
        undisturbed, dst = tmp_path / "undisturbed", tmp_path / "dst"
        quantize_checkpoint(src, undisturbed, max_shard_bytes=SMALL)
        stop_at_the_end(src, dst)
        shards = sorted((dst / WORK).glob("*.safetensors"))
        content = bytearray(shards[0].read_bytes())
        content[-1] ^= 1
        status = shards[0].stat()
        shards[0].write_bytes(content)
        os.utime(shards[0], ns=(status.st_atime_ns, status.st_mtime_ns))

        result = quantize_checkpoint(src, dst, max_shard_bytes=SMALL)

        assert 0 < result.resumed_shards == len(shards) - 1
        assert checkpoints.contents(dst) == checkpoints.contents(undisturbed)

    @pytest.mark.parametrize("garbage", [b"", b"{}", b"[1]", b"\xff" * 9, b"[" * 99999])
    def test_a_damaged_record_is_no_reason_to_stop(
        self, src: Path, tmp_path: Path, garbage: bytes
    ) -> None:
        stop_at_the_end(src, tmp_path / "dst")
        records = sorted((tmp_path / "dst" / WORK).glob("*.record"))
        records[0].write_bytes(garbage)

        result = quantize_checkpoint(src, tmp_path / "dst", max_shard_bytes=SMALL)

        assert 0 < result.resumed_shards == len(records) - 1

    def test_a_source_replaced_with_its_times_kept_is_read_again(
        self, src: Path, tmp_path: Path
    ) -> None:
        stop_at_the_end(src, tmp_path / "dst")
        before = {path: path.stat() for path in src.iterdir()}
        values = checkpoints.tensors()
        name = "model.layers.1.mlp.experts.2.up_proj.weight"
        values[name] = values[name] * -1
        checkpoints.save(src, values)
        for path, status in before.items():
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

        result = quantize_checkpoint(src, tmp_path / "dst", max_shard_bytes=SMALL)

        assert 0 < result.resumed_shards == result.shards - 2
        assert_same(checkpoints.load(tmp_path / "dst"), quantized_by_hand(values))

    def test_a_source_that_was_copied_elsewhere_meanwhile_is_gone_on_with(
        self, src: Path, tmp_path: Path
    ) -> None:
        stop_at_the_end(src, tmp_path / "dst")
        copy = shutil.copytree(src, tmp_path / "copy", copy_function=shutil.copyfile)
        shutil.rmtree(src)

        result = quantize_checkpoint(copy, tmp_path / "dst", max_shard_bytes=SMALL)

        assert 0 < result.resumed_shards == result.shards - 1

    @pytest.mark.parametrize("damage", ["shard", "moved shard", "tokenizer", "manifest"])
    def test_nothing_damaged_is_published(
        self, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
    ) -> None:
        dst, undisturbed = tmp_path / "dst", tmp_path / "undisturbed"
        quantize_checkpoint(src, undisturbed, max_shard_bytes=SMALL)
        with monkeypatch.context() as patched, pytest.raises(_CutOffError):
            cut_off_at(3, dst, patched)
            quantize_checkpoint(src, dst, max_shard_bytes=SMALL)
        damaged = {
            "shard": max((dst / WORK).glob("*.safetensors")),
            "moved shard": min(dst.glob("*.safetensors")),
            "tokenizer": dst / WORK / "tokenizer.json",
            "manifest": dst / WORK / MANIFEST,
        }[damage]
        damaged.write_bytes(b"\0" * damaged.stat().st_size)

        result = quantize_checkpoint(src, dst, max_shard_bytes=SMALL)

        assert result.resumed_shards >= result.shards - 1 or damage == "manifest"
        assert checkpoints.contents(dst) == checkpoints.contents(undisturbed)

    def test_a_folder_swapped_for_a_link_while_a_run_goes_on_loses_nothing(
        self, src: Path, tmp_path: Path
    ) -> None:
        stranger, dst = tmp_path / "stranger", tmp_path / "dst"
        stranger.mkdir()
        (stranger / "precious.txt").write_text("precious")

        def swap(done: int, total: int) -> None:
            if done < total / 2 or (dst / WORK).is_symlink():
                return
            (dst / WORK).rename(tmp_path / "aside")
            (dst / WORK).symlink_to(stranger)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(src, dst, progress=swap, workers=1)

        assert [path.name for path in stranger.iterdir()] == ["precious.txt"]
        with pytest.raises(CheckpointError, match="was not made by nxdi-expertscale"):
            quantize_checkpoint(src, dst)
        assert [path.name for path in stranger.iterdir()] == ["precious.txt"]


def stop_at_the_end(src: Path, dst: Path) -> None:
    """Cut a run off when all shards but the last are finished."""

    def stop_late(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(src, dst, max_shard_bytes=SMALL, workers=1, progress=stop_late)


class _CutOffError(BaseException):
    """A kill, as far as it can be had within a process."""


def cut_off_at(step: int, dst: Path, patched: pytest.MonkeyPatch) -> None:
    """Fail at the given call of what changes a folder, once all files are written."""
    steps = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal steps
            if (dst / WORK / MANIFEST).is_file():
                steps += 1
                if steps > step:
                    raise _CutOffError
            return function(*arguments)

        return call

    for name in ("move", "remove"):
        patched.setattr(PinnedFolder, name, counted(getattr(PinnedFolder, name)))


def is_part_of(found: dict[str, bytes], whole: dict[str, bytes]) -> bool:
    """Whether all that NxDI reads is that of one run."""
    names = {name for name in whole if name.endswith((".safetensors", INDEX))}
    return bool(names) and all(found.get(name) == whole[name] for name in names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_not_convert": "lm_head"}, "is one string"),
        ({"modules_to_not_convert": [" "]}, "an empty name would exclude"),
        ({"modules_to_not_convert": ["layers.0.mlp.experts.3"]}, "'layers.0.mlp.experts'"),
        ({"workers": 0}, "workers: 0"),
        ({"max_shard_bytes": 0}, "max_shard_bytes: 0"),
    ],
)
def test_impossible_settings_are_refused(
    src: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        quantize_checkpoint(src, tmp_path / "dst", **settings)

    assert not (tmp_path / "dst").exists()
