"""``NXDI_PLUGINS`` at interpreter start, in every process and in every kind of installation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.installed import ROOT, Environment, run

START_UP_FILES = {
    "nxdi_expertscale_startup.pth",
    "nxdi_expertscale_startup.py",
    "nxdi_expertscale_startup.start",
}

STATE = """
import json, sys
loaded = "nxdi_expertscale" in sys.modules
import nxdi_expertscale.activation as activation
print(json.dumps([loaded, *activation.active_plugins()]))
"""
"""Prints whether the package was there at the start, and the plugins that are active."""

IMPORTED = """
import sys
print(sorted({name.partition(".")[0] for name in sys.modules} & {
    "nxdi_expertscale", "nxdi_expertscale_startup", "wrapt", "pluggy", "torch"}
    | {"importlib.metadata"} & set(sys.modules)))
"""


def state(environment: Environment, **variables: str) -> list[object]:
    found: list[object] = json.loads(environment.prints(STATE, **variables))
    return found


def test_unset_nothing_is_imported_at_start_and_importing_activates(installed: Environment) -> None:
    assert installed.prints(IMPORTED) == "[]"
    assert state(installed) == [False, "expertscale"]


def test_names_are_activated_at_start_without_torch(installed: Environment) -> None:
    assert state(installed, NXDI_PLUGINS="expertscale") == [True, "expertscale"]
    assert "torch" not in installed.prints(IMPORTED, NXDI_PLUGINS="expertscale")


@pytest.mark.parametrize("value", ["", " ", ","])
def test_no_name_turns_everything_off(installed: Environment, value: str) -> None:
    assert state(installed, NXDI_PLUGINS=value)[1:] == []


def test_empty_value_imports_nothing_at_start(installed: Environment) -> None:
    assert installed.prints(IMPORTED, NXDI_PLUGINS="") == "[]"


@pytest.mark.parametrize(("option", "read"), [("-I", True), ("-E", True), ("-S", False)])
def test_options_of_the_interpreter(installed: Environment, option: str, read: bool) -> None:
    """``-I`` and ``-E`` leave out Python's own variables; ``-S`` leaves out path files."""
    code = "import sys; print('nxdi_expertscale' in sys.modules)"

    result = installed.run(option, "-c", code, NXDI_PLUGINS="expertscale")

    assert (result.stdout, result.stderr) == (f"{read}\n", "")


def test_unknown_name_is_one_line_and_the_interpreter_goes_on(installed: Environment) -> None:
    code = "import nxdi_expertscale; nxdi_expertscale.activate(); print('goes on')"

    result = installed.run("-c", code, NXDI_PLUGINS="nosuch,expertscale")

    assert (result.returncode, result.stdout) == (0, "goes on\n")
    (line,) = result.stderr.splitlines()
    assert "'nosuch'" in line
    assert "expertscale" in line


def test_only_the_named_plugins_are_activated(own_installation: Environment) -> None:
    own_installation.add_plugin("other", "")

    assert state(own_installation, NXDI_PLUGINS="other") == [True, "other"]
    assert state(own_installation, NXDI_PLUGINS="other, expertscale") == [
        True,
        "other",
        "expertscale",
    ]
    assert state(own_installation) == [False, "expertscale", "other"]


@pytest.mark.parametrize(
    "source", ["raise RuntimeError('two\\nlines')", "raise SystemExit(3)", "import no_such_module"]
)
def test_broken_plugin_is_one_line_and_stops_nothing(
    own_installation: Environment, source: str
) -> None:
    own_installation.add_plugin("broken", source)

    result = own_installation.run("-c", "print('goes on')", NXDI_PLUGINS="broken,expertscale")

    assert (result.returncode, result.stdout) == (0, "goes on\n")
    (line,) = result.stderr.splitlines()
    assert "broken" in line


def test_installation_without_its_dependencies_is_one_line(own_installation: Environment) -> None:
    (own_installation.site_packages / "zz_dependencies.pth").unlink()

    result = own_installation.run("-c", "print('goes on')", NXDI_PLUGINS="expertscale")

    assert (result.returncode, result.stdout) == (0, "goes on\n")
    (line,) = result.stderr.splitlines()
    assert "NXDI_PLUGINS" in line
    assert "ModuleNotFoundError" in line


def test_nothing_is_printed_where_there_is_no_stderr(own_installation: Environment) -> None:
    own_installation.add_plugin("broken", "raise SystemExit(3)")
    script = f"{own_installation.python} -c 'print(\"goes on\")' 2>&-"

    result = run(["sh", "-c", script], {"NXDI_PLUGINS": "broken,nosuch"})

    assert result.stdout == "goes on\n"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_are_activated(installed: Environment, tmp_path: Path, method: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, sys\n"
        "def child(): sys.exit(7 if 'nxdi_expertscale.activation' in sys.modules else 1)\n"
        "if __name__ == '__main__':\n"
        f"    process = multiprocessing.get_context({method!r}).Process(target=child)\n"
        "    process.start(); process.join(); print(process.exitcode)\n"
    )

    result = installed.run(str(program), NXDI_PLUGINS="expertscale")

    assert (result.stdout, result.stderr) == ("7\n", "")


def test_processes_of_torchrun_are_activated(installed: Environment, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, sys\n"
        "active = 'nxdi_expertscale.activation' in sys.modules\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(active))\n"
    )

    result = installed.run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)),
        NXDI_PLUGINS="expertscale",
    )

    assert result.returncode == 0, result.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True", "True"]


def test_user_site_is_read_before_activation(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment", system_site_packages=True)
    environment.pip("install", "--quiet", "--no-deps", "--ignore-installed", str(wheel))
    environment.add_dependencies()
    user_site = Path(
        environment.prints("import site; print(site.getusersitepackages())", HOME=str(tmp_path))
    )
    user_site.mkdir(parents=True)
    (user_site / "usercustomize.py").write_text(
        "import sys; sys.modules['seen'] = 'nxdi_expertscale' in sys.modules"
    )

    code = "import sys; print(sys.modules['seen'], 'nxdi_expertscale' in sys.modules)"
    assert environment.prints(code, HOME=str(tmp_path), NXDI_PLUGINS="expertscale") == "False True"


def test_folder_that_a_program_makes_a_site_folder_activates_at_once(
    own_installation: Environment, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    for name in START_UP_FILES:
        (own_installation.site_packages / name).rename(tmp_path / "site" / name)

    code = f"import site; site.addsitedir({str(tmp_path / 'site')!r}); {STATE}"
    assert json.loads(own_installation.prints(code, NXDI_PLUGINS="expertscale")) == [
        True,
        "expertscale",
    ]


def test_entry_of_the_start_file_does_what_the_path_file_does(installed: Environment) -> None:
    """Python 3.15 reads it (PEP 829); here it is resolved as that Python will."""
    text = (installed.site_packages / "nxdi_expertscale_startup.start").read_text()
    (entry,) = [line for line in text.splitlines() if line and not line.startswith("#")]
    folders = [str(installed.site_packages), *dependencies(installed)]
    code = f"""
import pkgutil, sys
sys.path[:0] = {folders}
pkgutil.resolve_name({entry!r})()
{IMPORTED}"""

    # -S: without the path file, which that Python does not read.
    unset = installed.run("-S", "-c", code)
    named = installed.run("-S", "-c", code, NXDI_PLUGINS="expertscale")

    assert (unset.stdout.strip(), unset.stderr) == ("['nxdi_expertscale_startup']", "")
    assert "'nxdi_expertscale', 'nxdi_expertscale_startup'" in named.stdout


def dependencies(environment: Environment) -> list[str]:
    return (environment.site_packages / "zz_dependencies.pth").read_text().splitlines()


def test_uninstalling_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    before = environment.files()
    environment.pip("install", "--quiet", "--no-deps", str(wheel))
    assert environment.files() >= START_UP_FILES
    environment.run("-c", "pass", NXDI_PLUGINS="expertscale")

    environment.pip("uninstall", "--quiet", "--yes", "nxdi-expertscale")

    assert environment.files() == before


def test_editable_installation_starts_up_and_uninstalls_alike(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    before = environment.files()
    # The build needs hatchling, which the tests have.
    environment.add_dependencies()
    with_dependencies = environment.files()
    environment.pip(
        *("install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed"),
        *("--editable", str(ROOT)),
    )

    assert environment.files() >= START_UP_FILES
    assert state(environment, NXDI_PLUGINS="expertscale") == [True, "expertscale"]
    assert state(environment) == [False, "expertscale"]

    environment.pip("uninstall", "--quiet", "--yes", "nxdi-expertscale")
    left = {path for path in environment.files() - with_dependencies if "__pycache__" not in path}
    assert (left, before - environment.files()) == (set(), set())


def test_start_up_leaves_no_trace_in_site(installed: Environment) -> None:
    code = "import site; print(site.execsitecustomize.__module__, site.execsitecustomize.__name__)"
    assert installed.prints(code, NXDI_PLUGINS="expertscale") == "site execsitecustomize"
