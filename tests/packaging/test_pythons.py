"""Each supported Python, with each torch a host may have: pip leaves torch alone, and it works.

A host's torch is stood in for by a distribution of its name and version, because the real ones
are gigabytes: what is shown is that pip keeps it, and all that needs no torch, for real. The real
ones are installed where ``NXDI_EXPERTSCALE_TORCHES`` names them (``2.5.1,2.9.1``), and have to
write the bytes that the tests' own torch does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nxdi_expertscale.checkpoint import quantize_checkpoint
from tests.harness import checkpoints
from tests.harness.installed import ROOT, Environment, build_wheel
from tests.harness.interpreters import VERSIONS, make_environment

TORCHES = ("2.5.1", "2.9.1", "2.13.0")
TORCH_FREE = (
    "test_plugins.py",
    "test_families.py",
    "test_exclusions.py",
    "test_device_variables.py",
)
"""Unit tests that need no torch."""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session", params=VERSIONS)
def environment(
    request: pytest.FixtureRequest,
    wheel: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Environment:
    """The wheel and its dependencies, as pip installs them beside a host's torch."""
    folder = tmp_path_factory.mktemp(f"python{request.param}") / "environment"
    found = make_environment(request.param, folder)
    found.pip("install", "--quiet", "--no-index", str(torch_wheel(folder.parent, TORCHES[0])))
    found.pip("install", "--quiet", str(wheel), "pytest", "hypothesis")
    return found


def torch_wheel(folder: Path, version: str) -> Path:
    """A distribution that has torch's name and version and nothing in it."""
    path = folder / f"torch-{version}-py3-none-any.whl"
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.parametrize("torch", TORCHES)
def test_pip_leaves_the_torch_of_the_host(
    environment: Environment, wheel: Path, tmp_path: Path, torch: str
) -> None:
    stand_in = torch_wheel(tmp_path, torch)
    environment.pip("install", "--quiet", "--no-index", "--force-reinstall", str(stand_in))
    report = tmp_path / "report.json"

    environment.pip(
        "install", "--quiet", "--dry-run", "--report", str(report), f"{wheel}[evaluate]"
    )

    planned = {item["metadata"]["name"] for item in json.loads(report.read_text())["install"]}
    assert "torch" not in planned
    code = "import importlib.metadata as m; print(m.version('torch'))"
    assert environment.prints(code) == torch


def test_an_older_torch_is_refused(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    old = torch_wheel(tmp_path, "2.4.1")

    conflict = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", str(environment.python)),
            *("install", "--dry-run", "--no-index", str(old), str(wheel)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert conflict.returncode == 1
    assert "torch>=2.5" in conflict.stdout + conflict.stderr


def test_unit_tests_without_torch_pass(environment: Environment, tmp_path: Path) -> None:
    """On the installed package, not the source tree."""
    folder = tmp_path / "tests" / "unit"
    folder.mkdir(parents=True)
    for name in ("conftest.py", *TORCH_FREE):
        shutil.copy(ROOT / "tests" / "unit" / name, folder)

    result = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder))

    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@pytest.mark.parametrize(
    "torch", filter(None, os.environ.get("NXDI_EXPERTSCALE_TORCHES", "").split(","))
)
def test_real_torch_writes_the_same_bytes(wheel: Path, tmp_path: Path, torch: str) -> None:
    """In an environment of its own, which is gigabytes where the index's torch is one with CUDA."""
    version = ".".join(map(str, sys.version_info[:2]))
    environment = make_environment(version, tmp_path / "environment")
    environment.pip("install", "--quiet", "--no-compile", f"torch=={torch}", str(wheel))
    src = checkpoints.save(tmp_path / "src")
    expected = quantize_checkpoint(src, tmp_path / "expected").destination

    made = environment.command("quantize", str(src), str(tmp_path / "made"))
    verified = environment.command("verify", str(tmp_path / "made"), "--against", str(src))

    assert (made.returncode, verified.returncode) == (0, 0), made.stderr + verified.stderr
    assert environment.prints("import torch; print(torch.__version__)").startswith(torch)
    shards = sorted(path.name for path in expected.glob("*.safetensors"))
    assert shards
    for name in shards:
        assert (tmp_path / "made" / name).read_bytes() == (expected / name).read_bytes()
    shutil.rmtree(environment.folder)
