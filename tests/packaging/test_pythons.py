"""Each supported Python, with each torch a host may have: pip leaves torch alone, and it works.

A host's torch is stood in for by a distribution of its name and version, because the real ones
are gigabytes: what is shown is that pip keeps it, and all that needs no torch, for real.

The interpreters are those on ``PATH``, of pyenv, and named in ``NXDI_EXPERTSCALE_PYTHONS``
(paths, with ``:`` between them).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.installed import ROOT, Environment, build_wheel, run

VERSIONS = ("3.10", "3.11", "3.12")
TORCHES = ("2.5.1", "2.9.1", "2.13.0")
TORCH_FREE = (
    "test_plugins.py",
    "test_families.py",
    "test_exclusions.py",
    "test_device_variables.py",
)
"""Unit tests that need no torch."""


def candidates() -> Iterator[str]:
    yield from filter(None, os.environ.get("NXDI_EXPERTSCALE_PYTHONS", "").split(os.pathsep))
    for version in VERSIONS:
        found = shutil.which(f"python{version}")
        if found is not None:
            yield found
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from map(str, sorted(pyenv.glob("versions/3.*/bin/python")))


def version_of(python: str) -> str | None:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


@pytest.fixture(scope="session")
def pythons() -> dict[str, str]:
    found: dict[str, str] = {}
    for candidate in candidates():
        version = version_of(candidate)
        if version in VERSIONS:
            found.setdefault(version, candidate)
    return found


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session", params=VERSIONS)
def environment(
    request: pytest.FixtureRequest,
    pythons: dict[str, str],
    wheel: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Environment:
    """The wheel and its dependencies, as pip installs them beside a host's torch."""
    version: str = request.param
    if version not in pythons:
        pytest.skip(f"there is no Python {version} here")
    folder = tmp_path_factory.mktemp(f"python{version}") / "environment"
    run([pythons[version], "-m", "venv", "--without-pip", str(folder)])
    found = Environment(folder)
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


def test_what_needs_no_torch_works(environment: Environment) -> None:
    """Import, activation at start, help and doctor, with every warning an error."""
    errors = ("-W", "error")
    imported = environment.run(*errors, "-c", "import nxdi_expertscale")
    assert (imported.returncode, imported.stderr) == (0, "")
    code = "import nxdi_expertscale.activation as a; print(*a.active_plugins())"
    assert environment.prints(code, NXDI_PLUGINS="expertscale") == "expertscale"
    script = str(environment.folder / "bin" / "nxdi-expertscale")
    helped = environment.run(*errors, script, "quantize", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "DST" in helped.stdout
    examined = environment.run(*errors, script, "doctor", "--json")
    assert (examined.returncode, examined.stderr) == (1, "")
    assert json.loads(examined.stdout)["problems"]


def test_every_module_is_valid_for_this_python(environment: Environment) -> None:
    folder = environment.site_packages / "nxdi_expertscale"

    result = environment.run("-W", "error", "-m", "compileall", "-q", "-f", str(folder))

    assert (result.returncode, result.stdout) == (0, "")


def test_unit_tests_without_torch_pass(environment: Environment, tmp_path: Path) -> None:
    """On the installed package, not the source tree."""
    folder = tmp_path / "tests" / "unit"
    folder.mkdir(parents=True)
    for name in ("conftest.py", *TORCH_FREE):
        shutil.copy(ROOT / "tests" / "unit" / name, folder)

    result = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder))

    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
