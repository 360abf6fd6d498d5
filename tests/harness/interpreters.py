"""The Pythons of this machine that the package supports.

They are those on ``PATH``, of pyenv, and named in ``NXDI_EXPERTSCALE_PYTHONS`` (paths, with ``:``
between them).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.harness.installed import Environment, run

VERSIONS = ("3.10", "3.11", "3.12", "3.13")


def _candidates() -> Iterator[str]:
    yield from filter(None, os.environ.get("NXDI_EXPERTSCALE_PYTHONS", "").split(os.pathsep))
    for version in VERSIONS:
        found = shutil.which(f"python{version}")
        if found is not None:
            yield found
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from map(str, sorted(pyenv.glob("versions/3.*/bin/python")))


def _version_of(python: str) -> str | None:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


@cache
def _pythons() -> dict[str, str]:
    found: dict[str, str] = {}
    for candidate in _candidates():
        version = _version_of(candidate)
        if version in VERSIONS:
            found.setdefault(version, candidate)
    return found


def make_environment(version: str, folder: Path) -> Environment:
    """Make an empty environment of a Python, without pip; skip the test where there is none.

    Args:
        version: One of ``VERSIONS``.
        folder: A folder that is not there yet.
    """
    if version not in _pythons():
        pytest.skip(f"there is no Python {version} here")
    run([_pythons()[version], "-m", "venv", "--without-pip", str(folder)])
    return Environment(folder)
