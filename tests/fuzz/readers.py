"""Every reader of checkpoints, on a folder that a recipe has spoilt."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from nxdi_expertscale.checkpoint import (
    inspect_checkpoint,
    neuron_settings,
    quantize_checkpoint,
    verify_checkpoint,
)
from nxdi_expertscale.checkpoint.finished import check_finished, tensor_names
from nxdi_expertscale.checkpoint.origin import mismatch
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.checkpoint.write.staging import WORK
from nxdi_expertscale.errors import ExpertScaleError
from nxdi_expertscale.evaluation.architecture import derive_architecture
from nxdi_expertscale.evaluation.stored_weights import StoredWeights
from tests.fuzz.guard import guarded
from tests.fuzz.recipes import Files, Folder, Step
from tests.harness import checkpoints

SETTINGS: dict[str, Any] = {"workers": 1, "max_shard_bytes": 40_000}


def try_recipe(start: str, steps: list[Step]) -> bool:
    """Spoil a good folder and read it in every way.

    Returns:
        Whether something could be read.

    Raises:
        AssertionError: Something was written elsewhere, or run; a result is not right.
        Exception: Any other than this package's own: a reader broke.
    """
    with tempfile.TemporaryDirectory(dir=_memory()) as scratch:
        path = Path(scratch)
        (path / "outside").write_text("not the checkpoint's")
        folder = Folder(path / "model", good_folders()[start])
        for step in steps:
            folder.spoil(step)
        (path / "output").mkdir()
        Folder(path / "source", good_folders()["bfloat16"])
        outcomes = [_reads(call, path) for call in _CALLS[start]]
        return any(outcomes)


def _reads(call: Callable[[Path], None], path: Path) -> bool:
    written = path / "model" if call in _WRITERS_IN_PLACE else path / "output"
    # What is known of a folder is remembered there, where the machine has been slow enough.
    remembered = path / "cache"
    try:
        with _cache_in(remembered), guarded(written, remembered):
            call(path)
    except ExpertScaleError as error:
        # A message has to be printable, and to say something.
        assert str(error).encode().strip()
        return False
    return True


def _cache_in(folder: Path) -> AbstractContextManager[Any]:
    return mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder))


def _open(path: Path) -> None:
    model = open_model(path / "model")
    derive_architecture(model.config, model.family)
    with StoredWeights(model) as weights:
        for name in sorted(weights.names)[:3]:
            weights(name)


def _inspect(path: Path) -> None:
    inspect_checkpoint(path / "model", workers=1)


def _quantize(path: Path) -> None:
    """What is made of a folder that is read is right, however odd the folder."""
    output = path / "output" / "fp8"
    quantize_checkpoint(path / "model", output, **SETTINGS)
    assert verify_checkpoint(output, path / "model", workers=1).faults == ()
    found = {name for file in output.glob("*.safetensors") for name in load_file(file)}
    assert found == tensor_names(output)
    neuron_settings(output)


def _verify(path: Path) -> None:
    verify_checkpoint(path / "model", workers=1)


def _settings(path: Path) -> None:
    neuron_settings(path / "model")


def _manifest(path: Path) -> None:
    check_finished(path / "model")
    tensor_names(path / "model")
    mismatch(path / "model", path / "source", ["lm_head"])


def _replace(path: Path) -> None:
    """A folder that anyone made is replaced by ours."""
    quantize_checkpoint(path / "source", path / "model", overwrite=True, **SETTINGS)


_FULL = (_open, _inspect, _quantize)
_CALLS: Mapping[str, tuple[Callable[[Path], None], ...]] = {
    "bfloat16": _FULL,
    "blocks": _FULL,
    "channels": _FULL,
    "stacked": _FULL,
    "finished": (_inspect, _verify, _settings, _manifest, _replace),
    "begun": (_verify, _replace),
}
_WRITERS_IN_PLACE = (_replace,)
STARTS = tuple(_CALLS)


@cache
def good_folders() -> Mapping[str, Files]:
    """The folders that recipes start from, by name."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch)
        values = checkpoints.tensors()
        compressed = {"quantization_config": checkpoints.COMPRESSED_CONFIG}
        blocks = {"quantization_config": checkpoints.BLOCKS_CONFIG}
        checkpoints.save(path / "bfloat16", values)
        checkpoints.save(path / "blocks", checkpoints.in_blocks(values), config=blocks)
        checkpoints.save(path / "channels", checkpoints.by_channel(values), config=compressed)
        checkpoints.save(path / "stacked", _stacked(values), shards=1)
        quantize_checkpoint(path / "bfloat16", path / "finished", **SETTINGS)
        _leave_begun(path / "bfloat16", path / "begun")
        return {start: checkpoints.contents(path / start) for start in STARTS}


def _leave_begun(src: Path, dst: Path) -> None:
    class _StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if 2 * done > total:
            raise _StopError

    try:
        quantize_checkpoint(src, dst, progress=stop, **SETTINGS)
    except _StopError:
        assert list((dst / WORK).glob("*.record"))


def _stacked(values: checkpoints.Tensors) -> checkpoints.Tensors:
    """The experts of each layer in two tensors, as Hugging Face's Qwen3.5 MoE has them."""
    found = {name: value for name, value in values.items() if ".experts." not in name}
    for layer in range(checkpoints.LAYERS):
        path = f"model.layers.{layer}.mlp.experts"

        def part(expert: int, name: str, path: str = path) -> torch.Tensor:
            return values[f"{path}.{expert}.{name}_proj.weight"]

        experts = range(checkpoints.EXPERTS)
        fused = [torch.cat([part(e, "gate"), part(e, "up")]) for e in experts]
        found[f"{path}.gate_up_proj"] = torch.stack(fused)
        found[f"{path}.down_proj"] = torch.stack([part(e, "down") for e in experts])
    return found


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
