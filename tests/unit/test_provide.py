"""The folder that NxDI is told to load: used if it is finished, made if it is not there."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from nxdi_expertscale import CheckpointError, ConfigurationError, quantize_checkpoint
from nxdi_expertscale.checkpoint import provide
from nxdi_expertscale.checkpoint.finished import checked_tensors, tensor_names
from nxdi_expertscale.checkpoint.write.folder_staging import FolderStaging
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST
from nxdi_expertscale.families.built_in import QWEN3_MOE
from tests.harness import checkpoints
from tests.harness.limits import PATIENCE


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "source", checkpoints.tensors())


def state_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_folder_is_made_once(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"

    provide.provide_checkpoint(source, folder, ["lm_head"])
    made = state_of(folder)
    provide.provide_checkpoint(source, folder, ["lm_head"])

    assert MANIFEST in made
    assert state_of(folder) == made


def test_the_finished_folder_alone_is_enough(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    quantize_checkpoint(source, folder)
    made = state_of(folder)

    provide.provide_checkpoint(folder, folder, [])

    assert state_of(folder) == made


def test_a_folder_that_another_process_makes_is_waited_for(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="nxdi_expertscale")
    folder = tmp_path / "fp8"
    second = threading.Thread(
        target=provide.provide_checkpoint,
        args=(source, folder, []),
        kwargs={"poll_seconds": 0.01},
    )
    waiting = threading.Event()

    class Notice(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting" in record.getMessage():
                waiting.set()

    notice = Notice()
    logging.getLogger("nxdi_expertscale").addHandler(notice)
    try:
        with FolderStaging(folder):
            second.start()
            assert waiting.wait(PATIENCE)
            assert not (folder / MANIFEST).exists()
        second.join(PATIENCE)
    finally:
        logging.getLogger("nxdi_expertscale").removeHandler(notice)

    assert (folder / MANIFEST).is_file()


def test_other_settings_and_lost_files_are_refused_with_what_to_do(
    source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fp8"
    quantize_checkpoint(source, folder)

    with pytest.raises(CheckpointError, match=r"made with other settings.*name another"):
        provide.provide_checkpoint(source, folder, ["lm_head"])
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"is missing.*verify"):
        provide.provide_checkpoint(source, folder, [])


def test_what_quantize_cannot_make_is_said(source: Path, tmp_path: Path) -> None:
    assert provide.find_obstacle(source, "f8e4m3", QWEN3_MOE) is None
    for path, dtype, family, says in (
        (source, "f8e4m3", None, "it is no mixture-of-experts model of a known family"),
        (source, "int8", QWEN3_MOE, "quantization_dtype is 'int8', not 'f8e4m3'"),
        (tmp_path / "none", "f8e4m3", QWEN3_MOE, f"{tmp_path / 'none'} is no local folder"),
        (tmp_path, "f8e4m3", QWEN3_MOE, f"{tmp_path} has no safetensors files"),
    ):
        assert provide.find_obstacle(path, dtype, family) == says


def test_nxdis_own_step_gets_a_folder_and_never_one_of_ours_or_the_model(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    provide.prepare_for_upstream(source, tmp_path / "new" / "fp8", "the reason")
    provide.prepare_for_upstream(source, tmp_path / "new" / "fp8", "the reason")
    quantize_checkpoint(source, tmp_path / "ours")

    assert list((tmp_path / "new" / "fp8").iterdir()) == []
    assert caplog.messages[0].endswith("quantized by NxDI itself, in memory: the reason")
    with pytest.raises(CheckpointError, match="NxDI would write over it, because the reason"):
        provide.prepare_for_upstream(source, tmp_path / "ours", "the reason")
    with pytest.raises(CheckpointError, match=r"is the model itself.*the reason"):
        provide.prepare_for_upstream(source, source / ".", "the reason")


def test_the_names_of_a_finished_folder_are_known_and_a_changed_one_is_refused(
    source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fp8"
    assert checked_tensors(None) == checked_tensors(str(folder)) == frozenset()
    assert checked_tensors(str(source)) == frozenset()
    quantize_checkpoint(source, folder)

    assert checked_tensors(str(folder)) == tensor_names(folder)
    assert "model.layers.0.mlp.experts.0.up_proj.weight_scale" in checked_tensors(str(folder))

    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=f"{shard.name}: has other content"):
        checked_tensors(str(folder))


@pytest.mark.parametrize(
    ("made_with", "asked", "says"),
    [
        ([], ["qkv_proj"], r"self_attn\.[qkv]_proj is quantized there, .*convert names it"),
        (["o_proj"], [], r"layers\.0\.self_attn\.o_proj is in full precision there, .*not name it"),
        ([], ["lm_haed"], r"'lm_haed' is no part of any module's name; did you mean 'lm_head'"),
    ],
)
def test_a_finished_folder_is_loaded_with_the_exclusions_that_it_has(
    source: Path, tmp_path: Path, made_with: list[str], asked: list[str], says: str
) -> None:
    folder = tmp_path / "fp8"
    quantize_checkpoint(source, folder, modules_to_not_convert=made_with)

    provide.provide_checkpoint(folder, folder, [*made_with, "mlp.gate"])
    with pytest.raises(ConfigurationError, match=says):
        provide.provide_checkpoint(folder, folder, asked)
