"""The package's own activation: the installed plugins' patches, in this process."""

from __future__ import annotations

import subprocess
import sys

import pytest

import nxdi_expertscale
from nxdi_expertscale import activation
from nxdi_expertscale.hooking.engine import engine


def test_patches_of_the_plugins_are_in_force_until_deactivation() -> None:
    nxdi_expertscale.activate()

    assert nxdi_expertscale.status() == engine.status() != ()
    assert activation.active_plugins() == ("expertscale",)

    nxdi_expertscale.deactivate()

    assert nxdi_expertscale.status() == engine.status() == ()
    assert activation.active_plugins() == ()


def test_problem_of_a_plugin_is_printed_once_for_each_activation_that_is_new(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NXDI_PLUGINS", "gone")

    nxdi_expertscale.activate()
    (problem,) = activation.plugin_problems()
    assert capsys.readouterr().err == f"nxdi-expertscale: {problem}\n"
    nxdi_expertscale.activate()
    assert capsys.readouterr().err == ""

    nxdi_expertscale.deactivate()
    assert activation.plugin_problems() == ()
    nxdi_expertscale.activate()
    assert capsys.readouterr().err == f"nxdi-expertscale: {problem}\n"


def test_importing_the_package_imports_neither_torch_nor_upstream() -> None:
    code = (
        "import sys, nxdi_expertscale; nxdi_expertscale.status();"
        "print([name for name in ('torch', 'numpy', 'neuronx_distributed', 'click', 'rich')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in nxdi_expertscale.__all__:
        assert getattr(nxdi_expertscale, name) is not None
    with pytest.raises(AttributeError, match="'nxdi_expertscale' has no attribute 'quantise'"):
        nxdi_expertscale.quantise  # noqa: B018
