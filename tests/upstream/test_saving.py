"""What NxDI's quantization step does with the flag on: make the FP8 folder once, or use it."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nxdi_expertscale.errors import ExpertScaleError
from tests.harness import models

pytestmark = pytest.mark.usefixtures("active")

MANIFEST = "nxdi_expertscale.json"


def save(nxdi: Any, source: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    """Call the step as vLLM-Neuron and inference_demo do; the settings to load the result with."""
    settings = {
        **nxdi.FP8,
        "quantized_checkpoints_path": str(folder),
        "expert_wise_scale": True,
        **settings,
    }
    config = nxdi.inference_config(source, **settings)
    nxdi.application_cls(source).save_quantized_state_dict(str(source), config)
    return settings


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture
def source(moe: Path, tmp_path: Path) -> Path:
    """A model that a test may change."""
    return shutil.copytree(moe, tmp_path / "source")


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="nxdi_expertscale")
    return caplog


def test_folder_is_made_and_loads(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    settings = save(nxdi, moe, tmp_path / "not" / "there")

    assert (tmp_path / "not" / "there" / MANIFEST).is_file()
    loaded = nxdi.load(moe, **settings)
    nxdi.assert_right(moe, loaded)


def test_finished_folder_is_used_as_it_is(
    nxdi: Any, moe: Path, tmp_path: Path, info: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "fp8"
    save(nxdi, moe, folder)
    before = state_of(folder)
    info.clear()

    save(nxdi, moe, folder)

    assert state_of(folder) == before
    assert [line for line in info.messages if "using the finished checkpoint" in line]
    assert not [line for line in info.messages if line.startswith("quantizing")]


def test_exclusions_may_be_written_as_either_world_has_them(
    nxdi: Any, moe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fp8"
    save(nxdi, moe, folder, modules_to_not_convert=["layers.0.mlp.experts"])

    under_both_names = ["layers.0.mlp.experts", "layers.0.mlp.expert_mlps", "mlp.gate"]
    settings = save(nxdi, moe, folder, modules_to_not_convert=under_both_names)

    nxdi.assert_right(moe, nxdi.load(moe, **settings))


def test_folder_of_other_settings_is_refused(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    save(nxdi, moe, folder)
    before = state_of(folder)

    with pytest.raises(ExpertScaleError, match=r"fp8: made with other settings: .*self_attn"):
        save(nxdi, moe, folder, modules_to_not_convert=["self_attn"])
    assert state_of(folder) == before


def test_folder_of_another_source_is_refused(nxdi: Any, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    save(nxdi, source, folder)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, source / "model.safetensors", {"format": "pt"})

    message = r"fp8: made from another source: lm_head\.weight has other content"
    with pytest.raises(ExpertScaleError, match=message):
        save(nxdi, source, folder)


def test_source_that_was_only_copied_is_the_same(nxdi: Any, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    save(nxdi, source, folder)
    before = state_of(folder)
    (source / "model.safetensors").touch()

    save(nxdi, source, folder)

    assert state_of(folder) == before


def test_finished_folder_may_be_the_model_itself(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    save(nxdi, moe, folder)
    before = state_of(folder)

    settings = save(nxdi, folder, folder)

    assert state_of(folder) == before
    nxdi.assert_right(moe, nxdi.load(folder, **settings))


def test_damaged_folder_is_refused(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    save(nxdi, moe, folder)
    next(folder.glob("model-*.safetensors")).unlink()

    with pytest.raises(ExpertScaleError, match=r"safetensors: is missing; copy the folder again"):
        save(nxdi, moe, folder)


def test_shard_that_was_changed_is_refused_when_it_is_loaded(
    nxdi: Any, moe: Path, tmp_path: Path
) -> None:
    settings = save(nxdi, moe, tmp_path / "fp8")
    shard = next((tmp_path / "fp8").glob("model-*.safetensors"))
    content, status = shard.read_bytes(), shard.stat()
    shard.write_bytes(content[:-9] + bytes(9))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))

    for expert_wise in (True, False):
        with pytest.raises(ExpertScaleError, match=f"{shard.name}: has other content"):
            nxdi.load(moe, **settings | {"expert_wise_scale": expert_wise})


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_weights_that_nxdi_would_load_instead_are_refused(
    nxdi: Any, moe: Path, tmp_path: Path, name: str
) -> None:
    settings = save(nxdi, moe, tmp_path / "fp8")
    (shard,) = (tmp_path / "fp8").glob("model-*.safetensors")
    shutil.copy(shard, tmp_path / "fp8" / name)

    with pytest.raises(ExpertScaleError, match=f"{name}: is no part of the checkpoint"):
        nxdi.load(moe, **settings)


def test_nxdis_own_step_leaves_a_folder_of_ours_alone(
    nxdi: Any, source: Path, moe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fp8"
    save(nxdi, moe, folder)
    before = state_of(folder)

    save(nxdi, moe, folder, expert_wise_scale=False)
    with pytest.raises(ExpertScaleError, match="made with other settings"):
        save(nxdi, moe, folder, expert_wise_scale=False, modules_to_not_convert=["lm_head"])
    with pytest.raises(ExpertScaleError, match="NxDI would write over it"):
        save(nxdi, moe, folder, expert_wise_scale=False, quantization_dtype="int8")

    assert state_of(folder) == before


def test_folder_may_be_named_from_the_home(
    nxdi: Any, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    config = nxdi.inference_config(
        moe, **nxdi.FP8, expert_wise_scale=True, quantized_checkpoints_path="~/fp8"
    )
    nxdi.application_cls(moe).save_quantized_state_dict(str(moe), config)

    assert (tmp_path / "fp8" / MANIFEST).is_file()
    assert not (tmp_path / "~").exists()


def test_folder_that_holds_something_else_is_refused(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not ours")

    with pytest.raises(ExpertScaleError, match="was not made by nxdi-expertscale"):
        save(nxdi, moe, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"not ours"


def test_malformed_source_is_refused_and_not_left_to_nxdi(
    nxdi: Any, source: Path, tmp_path: Path
) -> None:
    weights = load_file(source / "model.safetensors")
    missing = "model.layers.1.mlp.experts.3.up_proj.weight"
    del weights[missing]
    save_file(weights, source / "model.safetensors", {"format": "pt"})

    with pytest.raises(ExpertScaleError, match=r"layers\.1\.mlp\.experts\.3\.up_proj"):
        save(nxdi, source, tmp_path / "fp8")


def test_process_that_comes_second_waits_and_uses_the_folder(
    nxdi: Any,
    moe: Path,
    tmp_path: Path,
    info: pytest.LogCaptureFixture,
) -> None:
    from nxdi_expertscale.checkpoint.write.folder_staging import FolderStaging

    folder = tmp_path / "fp8"
    second = threading.Thread(target=save, args=(nxdi, moe, folder))
    with FolderStaging(folder):
        second.start()
        while not any("waiting" in line for line in info.messages):
            assert second.is_alive()
            time.sleep(0.01)
    second.join()

    assert (folder / MANIFEST).is_file()


def test_pickled_source_goes_to_nxdis_own_step(
    nxdi: Any, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(source / "model.safetensors")
    torch.save(weights, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    folder = tmp_path / "fp8"

    settings = save(nxdi, source, folder, modules_to_not_convert=[nxdi.ROUTER])

    assert [line for line in caplog.messages if "has no safetensors files" in line]
    assert folder.is_dir()
    assert not (folder / MANIFEST).exists()
    nxdi.assert_right(source, nxdi.load(source, **settings))


def test_nxdis_own_step_never_writes_over_a_finished_folder(
    nxdi: Any, moe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fp8"
    save(nxdi, moe, folder)
    before = state_of(folder)

    with pytest.raises(ExpertScaleError, match="'int8'"):
        save(nxdi, moe, folder, quantization_dtype="int8")
    assert state_of(folder) == before


def test_without_the_flag_nothing_changes(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    save(nxdi, moe, tmp_path / "pickle", expert_wise_scale=False)
    (tmp_path / "folder").mkdir()
    save(nxdi, moe, tmp_path / "folder", expert_wise_scale=False)

    assert (tmp_path / "pickle").is_file()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["model.safetensors"]


def test_deactivation_gives_back_the_same_class_method(nxdi: Any, moe: Path) -> None:
    import nxdi_expertscale

    base = next(
        parent
        for parent in nxdi.application_cls(moe).__mro__
        if parent.__name__ == "NeuronApplicationBase"
    )
    patched = vars(base)["save_quantized_state_dict"]

    nxdi_expertscale.deactivate()

    original = vars(base)["save_quantized_state_dict"]
    assert isinstance(original, classmethod)
    assert patched.__wrapped__ is original


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each weight whose range is looked at."""
    from nxdi_expertscale.numerics import fp8

    looks: list[int] = []
    exceeds_range = fp8.exceeds_range

    def counted(weight: torch.Tensor) -> bool:
        looks.append(1)
        return exceeds_range(weight)

    monkeypatch.setattr(fp8, "exceeds_range", counted)
    return looks


def test_range_of_an_untouched_folder_is_taken_on_its_manifests_word(
    nxdi: Any, moe: Path, tmp_path: Path, looked_at: list[int]
) -> None:
    settings = save(nxdi, moe, tmp_path / "fp8")
    looked_at.clear()

    nxdi.load(moe, **settings)

    assert looked_at == []


def test_range_of_any_other_state_dict_is_looked_at(
    nxdi: Any, moe: Path, tmp_path: Path, looked_at: list[int]
) -> None:
    attention, head = 4, 1
    every_weight = models.LAYERS * (models.EXPERTS * 3 + attention) + head
    settings = save(nxdi, moe, tmp_path / "fp8")
    (tmp_path / "fp8" / MANIFEST).unlink()
    looked_at.clear()
    nxdi.load(moe, **settings)
    assert len(looked_at) == every_weight
