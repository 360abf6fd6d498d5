"""The wheel with the other supported Pythons that are here: all that works without torch.

Beside it are the few dependencies that this takes. What pip makes of all of them, and of a host's
torch, is tested in tests/packaging.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from tests.harness.installed import Environment
from tests.harness.interpreters import VERSIONS, make_environment

OTHERS = [version for version in VERSIONS if not platform.python_version().startswith(version)]
"""Of the tests' own Python, the other tests of the commands tell more."""

LIGHT = ("click", "pluggy", "rich", "wrapt", "markdown-it-py", "mdurl", "pygments")
"""What help, the doctor and activation import, whole: pip need not look for what else they want."""

ERRORS = ("-W", "error")


@pytest.fixture(scope="module", params=OTHERS)
def environment(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    folder = tmp_path_factory.mktemp(f"python{request.param}") / "environment"
    found = make_environment(request.param, folder)
    found.pip("install", "--quiet", "--no-compile", "--no-deps", *LIGHT, str(wheel))
    return found


def test_every_module_is_valid(environment: Environment) -> None:
    folder = environment.site_packages / "nxdi_expertscale"

    result = environment.run(*ERRORS, "-m", "compileall", "-q", "-f", str(folder))

    assert (result.returncode, result.stdout) == (0, "")


def test_importing_it_gives_no_warning_and_activates_it(environment: Environment) -> None:
    code = "import nxdi_expertscale.activation as a; print(*a.active_plugins())"

    result = environment.run(*ERRORS, "-c", code)

    assert (result.stdout, result.stderr) == ("expertscale\n", "")


def test_variable_activates_it_when_the_interpreter_starts(environment: Environment) -> None:
    code = "import sys; print('nxdi_expertscale.activation' in sys.modules)"

    assert environment.prints(code) == "False"
    assert environment.prints(code, NXDI_PLUGINS="expertscale") == "True"


def test_help_and_the_doctor_need_no_torch(environment: Environment) -> None:
    script = str(environment.folder / "bin" / "nxdi-expertscale")

    helped = environment.run(*ERRORS, script, "quantize", "--help")
    examined = environment.run(*ERRORS, script, "doctor", "--json")

    assert (helped.returncode, helped.stderr) == (0, "")
    assert "DST" in helped.stdout
    assert (examined.returncode, examined.stderr) == (1, "")
    assert any("torch is not installed" in text for text in json.loads(examined.stdout)["problems"])


def test_an_error_is_one_line(environment: Environment) -> None:
    result = environment.command("neuron-config", "/no/such")

    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "/no/such" in result.stderr
