"""Runs that are killed at random moments: what is left never loads by half, and is completed."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from nxdi_expertscale.checkpoint import quantize_checkpoint
from tests.harness import checkpoints, processes

KILLS = int(os.environ.get("NXDI_EXPERTSCALE_KILLS", "60"))
"""How often a run is killed; more in the environment for a long test."""

INDEX = "model.safetensors.index.json"
SETTINGS: dict[str, Any] = {"max_shard_bytes": 10_000, "workers": 2}


def test_killed_runs_end_with_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    """Two requests take turns on one folder, and are killed: it is one's, the other's or none."""
    context = processes.quantizing_context()
    src, dst = checkpoints.save(tmp_path / "src"), tmp_path / "dst"
    source = checkpoints.contents(src)
    requests: dict[str, dict[str, Any]] = {
        "all": SETTINGS,
        "head": {**SETTINGS, "modules_to_not_convert": ["lm_head"]},
    }
    undisturbed = {}
    for name, settings in requests.items():
        quantize_checkpoint(src, tmp_path / name, **settings)
        undisturbed[name] = checkpoints.contents(tmp_path / name)
    chance = random.Random(0)
    longest, kills, moments = 60.0, 0, set[str]()
    while kills < KILLS:
        name = chance.choice(["all", "all", "all", "head"])
        process = context.Process(
            target=quantize_checkpoint,
            args=(src, dst),
            kwargs={**requests[name], "overwrite": True},
        )
        process.start()
        started = time.monotonic()
        # The first is left alone, and shows how long one takes on this machine.
        process.join(chance.uniform(0, longest) if dst.exists() else longest)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            moments.add(moment(dst))
            found = checkpoints.contents(dst) if dst.exists() else {}
            if INDEX in found:
                assert any(is_loaded_as(found, whole) for whole in undisturbed.values())
        else:
            assert process.exitcode == 0
            assert checkpoints.contents(dst) == undisturbed[name]
            longest = 1.2 * (time.monotonic() - started)

    quantize_checkpoint(src, dst, overwrite=True, **requests["all"])

    assert checkpoints.contents(dst) == undisturbed["all"]
    assert checkpoints.contents(src) == source
    assert len(moments) > 2, "the kills all came at the same moment"


def is_loaded_as(found: dict[str, bytes], whole: dict[str, bytes]) -> bool:
    """Whether the index and the files that it names are those of an undisturbed run."""
    names = {name for name in whole if name == INDEX or name.endswith(".safetensors")}
    return all(found.get(name) == whole[name] for name in names)


def moment(dst: Path) -> str:
    """How far a run was when it was killed."""
    work = dst / ".nxdi-expertscale"
    if not work.is_dir():
        return "outside"
    return f"{len(list(work.glob('*.record')))} shards"


@pytest.fixture(autouse=True)
def _no_leftover_server() -> Any:
    yield
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]
