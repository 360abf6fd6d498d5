from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nxdi_expertscale

Install = Callable[..., None]
Write = Callable[..., None]


@pytest.fixture(autouse=True)
def _inactive() -> Iterator[None]:
    """Every test starts with no patch in force, and leaves none behind."""
    nxdi_expertscale.deactivate()
    yield
    nxdi_expertscale.deactivate()


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write small modules that can be imported for the length of a test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(**sources: str) -> None:
        for name, source in sources.items():
            path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not an empty line less: a file of the same size and second would come from the cache.
            path.write_text(textwrap.dedent(source), encoding="utf-8")
        importlib.invalidate_caches()

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install plugins: a module, and a distribution that has an entry point for it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("NXDI_PLUGINS", raising=False)

    def install(**sources: str) -> None:
        for name, source in sources.items():
            monkeypatch.delitem(sys.modules, f"{name}_plugin", raising=False)
            (tmp_path / f"{name}_plugin.py").write_text(source, encoding="utf-8")
            info = tmp_path / f"{name}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[nxdi.plugins]\n{name} = {name}_plugin\n")

    return install
