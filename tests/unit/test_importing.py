"""A watched module that is run as a program."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nxdi_expertscale.hooking.watcher import ImportWatcher, name_of

PROGRAM = """
import sys
def answer(): return "the program's own"
if __name__ == "__main__":
    print(answer())
"""
WATCH = """
import sys
from nxdi_expertscale.hooking.watcher import ImportWatcher
def replace(module):
    module.answer = lambda: "what it was given"
ImportWatcher(replace).watch(["program"])
"""


@pytest.mark.parametrize("form", ["source", "bytecode"])
def test_it_is_reported_between_its_definitions_and_its_main_part(
    tmp_path: Path, form: str
) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    if form == "bytecode":
        subprocess.run([sys.executable, "-m", "compileall", "-b", "-q", str(path)], check=True)
        path.unlink()
    start = f"{WATCH}\nimport runpy\nrunpy._run_module_as_main('program')"

    result = subprocess.run(
        [sys.executable, "-c", start], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    if form == "source":
        assert (result.stdout, result.stderr) == ("what it was given\n", "")
    else:
        assert result.stdout == "the program's own\n"
        assert "cannot be patched" in result.stderr


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the reported modules; watched are ``program`` and ``library``."""
    names: list[str] = []

    def note(module: ModuleType) -> None:
        names.append(name_of(module))

    watcher = ImportWatcher(note)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    watcher.watch(["program", "library"])
    return names


def test_program_whose_variables_are_no_module_s_is_warned_of(
    tmp_path: Path, seen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)

    runpy.run_module("program", run_name="__main__")

    assert seen == []
    assert "cannot be patched" in caplog.text


def test_lines_are_those_of_the_source(tmp_path: Path, seen: list[str]) -> None:
    (tmp_path / "program.py").write_text(f"{PROGRAM}\n    raise RuntimeError('line 7')\n")

    with pytest.raises(RuntimeError, match="line 7") as error:
        runpy.run_module("program", run_name="__main__")

    assert error.traceback[-1].lineno + 1 == 7


def test_module_without_a_main_part_is_warned_of(
    tmp_path: Path, seen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "library.py").write_text("value = 1\n")

    assert runpy.run_module("library", run_name="__main__")["value"] == 1
    assert "cannot be patched" in caplog.text
