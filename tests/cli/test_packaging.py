"""What is shipped, and that it works where it is put."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.harness.installed import ROOT, Environment, run

START_UP = ("py", "pth", "start")
SHIPPED_BESIDE = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "PKG-INFO",
    "README.md",
    "pyproject.toml",
    "tox.ini",
    ".gitignore",
}
"""The sdist's files beside its folders; hatchling always adds ``.gitignore``."""


def sources(*folders: str) -> set[str]:
    """The files that git knows, or would, in some folders."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git repository: there is nothing to compare the file lists with")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def test_wheel_has_the_package_its_start_up_files_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)

    start_up = {f"nxdi_expertscale/startup.{kind}" for kind in START_UP}
    assert names == {
        *(sources("nxdi_expertscale") - start_up),
        *(f"nxdi_expertscale_startup.{kind}" for kind in START_UP),
        *(f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")),
        f"{info}/licenses/LICENSE",
    }
    assert "nxdi_expertscale/py.typed" in names


def test_sdist_has_what_building_and_testing_takes_and_nothing_else(tmp_path: Path) -> None:
    build(tmp_path, "sdist")

    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert names == sources("nxdi_expertscale", "tests", "benchmarks") | SHIPPED_BESIDE


def test_wheel_is_the_same_bytes_whenever_it_is_built(wheel: Path, tmp_path: Path) -> None:
    """From the tree and from the sdist, with other times on all files."""
    epoch = {"SOURCE_DATE_EPOCH": "1700000000"}
    build(tmp_path / "sdist", "sdist", epoch)
    (sdist,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "tree", filter="data")
    (tree,) = (tmp_path / "tree").iterdir()
    for number, path in enumerate(sorted(tree.rglob("*"))):
        os.utime(path, (10**9 + number, 10**9 + number))

    build(tmp_path / "one", "wheel", epoch)
    build(tmp_path / "two", "wheel", epoch, tree)

    (one,), (two,) = (list((tmp_path / name).glob("*.whl")) for name in ("one", "two"))
    assert (one.name, one.read_bytes()) == (two.name, two.read_bytes())
    assert one.name == wheel.name


def build(
    folder: Path, kind: str, variables: dict[str, str] | None = None, tree: Path = ROOT
) -> None:
    code = (
        "import os, sys, hatchling.build as backend; "
        f"os.chdir(sys.argv[1]); print(backend.build_{kind}(sys.argv[2]))"
    )
    folder.mkdir(exist_ok=True)
    run([sys.executable, "-c", code, str(tree), str(folder)], variables)


def test_no_warning_is_left_when_it_is_imported_and_used(installed: Environment) -> None:
    errors = ("-W", "error")
    imported = installed.run(*errors, "-c", "import nxdi_expertscale", NXDI_PLUGINS="expertscale")
    assert (imported.returncode, imported.stderr) == (0, "")
    script = str(installed.folder / "bin" / "nxdi-expertscale")
    for arguments in (["--help"], ["quantize", "--help"], ["doctor", "--json"]):
        result = installed.run(*errors, script, *arguments)
        assert (result.returncode in {0, 1}, result.stderr) == (True, "")


def test_annotations_are_shipped(installed: Environment, tmp_path: Path) -> None:
    """A program that uses the package is checked against them, strictly."""
    mypy = pytest.importorskip("mypy", reason="mypy checks it")
    assert mypy
    # What the annotations name of torch and numpy is another matter, and takes mypy half a minute.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n[mypy-torch.*,numpy.*,safetensors.*]\nfollow_imports = skip\n"
    )
    (tmp_path / "program.py").write_text(
        "from nxdi_expertscale import quantize_checkpoint, status\n"
        "result = quantize_checkpoint('a', 'b', workers='two')\n"
        "for seam in status(): print(seam.reason.upper())\n"
    )

    result = run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--python-version", "3.10"),
            *("--python-executable", str(installed.python), "--follow-imports=silent"),
            *("--cache-dir", str(tmp_path / "cache")),
            *("--config-file", str(tmp_path / "mypy.ini"), str(tmp_path / "program.py")),
        ],
        check=False,
    )

    assert "[arg-type]" in result.stdout, result.stdout
    assert "missing library stubs or py.typed" not in result.stdout
    assert "Found 1 error" in result.stdout, result.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="a read-only mount takes root")
def test_a_site_packages_that_may_not_be_written_is_enough(own_installation: Environment) -> None:
    site_packages = own_installation.site_packages
    for compiled in site_packages.rglob("__pycache__"):
        shutil.rmtree(compiled)
    before = own_installation.files()
    mount = (
        'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && ! touch "$1/new" 2>/dev/null '
        '&& exec "$2" "$3" doctor --json'
    )
    script = own_installation.folder / "bin" / "nxdi-expertscale"
    result = run(
        [
            *("unshare", "--mount", "sh", "-c", mount, "sh"),
            *map(str, (site_packages, own_installation.python, script)),
        ],
        {"NXDI_PLUGINS": "expertscale"},
        check=False,
    )

    if "mount" in result.stderr or "unshare" in result.stderr:
        pytest.skip(f"cannot mount: {result.stderr}")
    assert (result.returncode, result.stderr) == (1, "")
    assert json.loads(result.stdout)["activation"]
    assert own_installation.files() == before


def test_a_zip_path_is_enough_for_all_but_the_start_of_the_interpreter(
    wheel: Path, installed: Environment
) -> None:
    """``site`` reads ``.pth`` files from folders alone: there ``NXDI_PLUGINS`` starts nothing."""
    dependencies = (installed.site_packages / "zz_dependencies.pth").read_text().splitlines()
    code = (
        f"import sys; sys.path[:0] = [{str(wheel)!r}, *{dependencies!r}]\n"
        "assert 'nxdi_expertscale' not in sys.modules\n"
        "import nxdi_expertscale, nxdi_expertscale.activation as activation\n"
        f"assert nxdi_expertscale.__file__.startswith({str(wheel)!r})\n"
        "print(activation.active_plugins())\n"
        "from nxdi_expertscale.cli import main\n"
        "main(['quantize', '--help'])"
    )

    result = run([sys.executable, "-I", "-S", "-c", code], {"NXDI_PLUGINS": "expertscale"})

    assert result.stdout.startswith("('expertscale',)\n")
    assert "Usage: nxdi-expertscale quantize" in result.stdout
