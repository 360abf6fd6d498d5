"""The commands on a system without what Linux has beyond POSIX, as macOS is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nxdi_expertscale.checkpoint import parallel
from tests.harness import checkpoints

LINUX_ONLY = (
    "sched_getaffinity",
    "preadv",
    "pwritev",
    "fdatasync",
    "posix_fadvise",
    "posix_fallocate",
    "copy_file_range",
    "memfd_create",
    "O_DIRECTORY",
    "O_NOFOLLOW",
    "O_CLOEXEC",
    "O_PATH",
    "O_TMPFILE",
    "O_DIRECT",
)

_CODE = f"""
import os, sys
for name in {LINUX_ONLY!r}:
    if hasattr(os, name):
        delattr(os, name)
from nxdi_expertscale.evaluation import demo, small_model
demo.RECIPE = small_model.Recipe(steps=12, batch=1)
demo.TOKENS = 512
from nxdi_expertscale.cli import main
main(sys.argv[1:])
"""


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _CODE, *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_ended_well(result: subprocess.CompletedProcess[str]) -> None:
    """With nothing on stderr but how far it was, which a slow machine gives time to say."""
    said = [line for line in result.stderr.splitlines() if not line.endswith(" left")]
    assert (result.returncode, said) == (0, [])


def test_a_checkpoint_is_quantized_verified_and_inspected(tmp_path: Path) -> None:
    src, dst = checkpoints.save(tmp_path / "src"), tmp_path / "dst"

    made = run("quantize", src, dst, "--json")
    verified = run("verify", dst, "--against", src)
    inspected = run("inspect", dst)

    for result in (made, verified, inspected):
        assert_ended_well(result)
    assert json.loads(made.stdout)["shards"] == 1


def test_demo(tmp_path: Path) -> None:
    result = run("demo", "--json", XDG_CACHE_HOME=str(tmp_path))

    assert_ended_well(result)
    assert json.loads(result.stdout)["trained"]


def test_all_cores_are_used_where_processes_are_bound_to_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)

    assert parallel.available_cores() == 3
