"""A watched module that is run as a program."""

from __future__ import annotations

import compileall
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nxdi_expertscale.hooking.watcher import ImportWatcher
from tests.harness.limits import PATIENCE

PROGRAM = """
import json, sys
def answer(): return "the program's own"
def main():
    program = sys.modules["__main__"]
    print(json.dumps([answer(), program.__spec__.name, program.__file__, *sys.argv]))

if __name__ == "__main__":
    main()
"""

SPAWNING = """
import multiprocessing, sys
class Job:
    def __init__(self, number): self.number = number
def answer(): return "the program's own"
def work(job):
    print(f'["{answer()}", {job.number}]', flush=True)
def main():
    process = multiprocessing.get_context("spawn").Process(target=work, args=(Job(3),))
    process.start()
    process.join()
    sys.exit(process.exitcode)

if __name__ == '__main__':
    main()
"""

SITECUSTOMIZE = """
from nxdi_expertscale.hooking.watcher import ImportWatcher
def replace(module):
    module.answer = lambda: "what it was given"
ImportWatcher(replace, list).watch(["package.program"])
"""
"""In every process, as the package itself is where NXDI_PLUGINS names it."""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a source as the program ``python -m package.program``, which is watched."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))

    def run(
        source: str, *arguments: str, only_bytecode: bool = False
    ) -> subprocess.CompletedProcess[str]:
        program = tmp_path / "package" / "program.py"
        program.write_text(source)
        if only_bytecode:
            compileall.compile_file(program, legacy=True, quiet=1)
            program.unlink()
        return subprocess.run(
            [sys.executable, "-m", "package.program", *arguments],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    return run


def answer(result: subprocess.CompletedProcess[str]) -> Any:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_its_main_is_called_after_the_report_with_its_arguments(run: Run, tmp_path: Path) -> None:
    result = run(PROGRAM, "run", "--help")

    path = str(tmp_path / "package" / "program.py")
    assert answer(result) == ["what it was given", "package.program", path, path, "run", "--help"]
    assert result.stderr == ""


def test_its_functions_and_classes_reach_a_spawned_child(run: Run) -> None:
    result = run(SPAWNING)

    assert answer(result) == ["what it was given", 3]
    assert result.stderr == ""


def test_its_exit_status_and_traceback_are_its_own(run: Run) -> None:
    result = run(PROGRAM.replace("main():\n", "main():\n    raise KeyError('line 5')\n"))

    assert result.returncode == 1
    assert "program.py\", line 5, in main\n    raise KeyError('line 5')" in result.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"source": PROGRAM, "only_bytecode": True},
        {"source": PROGRAM + "    print('more')\n"},
        {"source": PROGRAM.replace('if __name__ == "__main__":\n    main()', "main()")},
    ],
    ids=["bytecode", "more than main", "no main part"],
)
def test_other_programs_run_as_they_are_with_a_warning(run: Run, change: dict[str, Any]) -> None:
    result = run(**change)

    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[0])[0] == "the program's own"
    assert "package.program is run as a program and is not patched" in result.stderr


def test_syntax_error_names_the_file(run: Run) -> None:
    result = run("def main(:\n")

    assert 'program.py", line 1\n    def main(:' in result.stderr


def test_program_that_is_run_within_a_process_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def replace(module: ModuleType) -> None:
        module.answer = lambda: "what it was given"  # type: ignore[attr-defined]

    (tmp_path / "program.py").write_text(PROGRAM.replace("program.__file__, ", ""))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "argv", ["python"])
    monkeypatch.delitem(sys.modules, "program", raising=False)
    ImportWatcher(replace, list).watch(["program"])

    runpy.run_module("program", run_name="__main__", alter_sys=True)

    path = str(tmp_path / "program.py")
    assert json.loads(capsys.readouterr().out) == ["what it was given", "program", path]
