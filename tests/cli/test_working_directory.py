"""Code of the folder that a command is run in is never run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.harness.installed import ROOT, Environment

NAMES = ("__future__", "typing", "json", "email", "torch", "click", "rich", "pluggy", "wrapt")
NAMES += ("tokenizers", "matplotlib", "neuronx_distributed_inference", "vllm", "evil")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose modules leave a trace when they are imported, and that names a plugin."""
    for name in NAMES:
        source = f"import os; os.mkdir({str(tmp_path / 'run')!r} + '-{name}')"
        (tmp_path / f"{name}.py").write_text(source)
    metadata = tmp_path / "evil-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[nxdi.plugins]\nevil = evil\n")
    return tmp_path


def run(
    environment: Environment, folder: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [environment.python, "-m", "nxdi_expertscale", *arguments],
        cwd=folder,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("allowed", [{}, {"NXDI_PLUGINS": "expertscale"}], ids=["unset", "set"])
@pytest.mark.parametrize(
    ("arguments", "status"), [(["doctor"], 1), (["inspect", "."], 2)], ids=["doctor", "inspect"]
)
def test_nothing_of_a_hostile_folder_is_run(
    arguments: list[str],
    status: int,
    allowed: dict[str, str],
    hostile: Path,
    installed: Environment,
) -> None:
    result = run(installed, hostile, *arguments, **allowed)

    assert list(hostile.glob("run-*")) == []
    assert result.returncode == status
    assert result.stderr.count("\n") == (1 if status == 2 else 0)


def test_folder_that_the_user_puts_on_the_path_is_trusted(
    hostile: Path, installed: Environment
) -> None:
    for name in set(NAMES) - {"evil"}:
        (hostile / f"{name}.py").unlink()

    run(installed, hostile, "--help", PYTHONPATH=str(hostile))

    assert [path.name for path in hostile.glob("run-*")] == ["run-evil"]


def test_source_tree_can_be_run_in_place(installed: Environment) -> None:
    result = run(installed, ROOT, "--version")

    assert (result.returncode, result.stderr) == (0, "")
