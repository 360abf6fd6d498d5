"""The plugins that are installed, those that ``NXDI_PLUGINS`` allows, and those that are broken."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest

import nxdi_expertscale
from nxdi_expertscale.families import built_in, declaration
from nxdi_expertscale.plugins.manager import load_plugins

Install = Callable[..., None]

GOOD = """
from nxdi_expertscale import MoEFamily, Patch, hookimpl

@hookimpl
def nxdi_moe_families():
    return [MoEFamily(name="good", model_types=("good",), converter="good_models:convert")]

@hookimpl
def nxdi_patches(families):
    seam = "good:" + ",".join(family.name for family in families)
    return [Patch(seam=seam, module="good_models", attribute="convert", wrapper=print)]
"""


def names(found: Sequence[declaration.MoEFamily]) -> list[str]:
    return [family.name for family in found]


BUILT_IN = names(built_in.BUILT_IN)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {"expertscale", "good"}),
        ("", set()),
        (" , ", set()),
        ("expertscale", {"expertscale"}),
        ("good", {"good"}),
        (" good , expertscale,good", {"expertscale", "good"}),
        ("EXPERTSCALE", set()),
    ],
)
def test_variable_allows_plugins(
    install: Install, monkeypatch: pytest.MonkeyPatch, value: str | None, expected: set[str]
) -> None:
    install(good=GOOD)
    if value is not None:
        monkeypatch.setenv("NXDI_PLUGINS", value)

    nxdi_expertscale.activate()

    assert set(nxdi_expertscale.activation.active_plugins()) == expected
    assert any(seam.seam == "config" for seam in nxdi_expertscale.status()) == (
        "expertscale" in expected
    )


def test_plugin_that_is_not_allowed_is_not_even_imported(install: Install) -> None:
    install(bad="raise SystemError('imported')")

    assert load_plugins(("expertscale",)).problems == ()
    assert "bad_plugin" not in sys.modules


def test_families_and_patches_of_a_plugin_are_added_to_ours(install: Install) -> None:
    install(good=GOOD)

    plugins = load_plugins(None)

    assert plugins.problems == ()
    assert names(plugins.families) == [*BUILT_IN, "good"]
    seams = {patch.seam for patch in plugins.patches}
    assert {"config", "state_dict:qwen3_moe", "state_dict:good"} < seams
    assert f"good:{','.join([*BUILT_IN, 'good'])}" in seams


_HOOK = "from nxdi_expertscale import MoEFamily, hookimpl\n@hookimpl\n"
BROKEN = {
    "raises": "raise RuntimeError('no\\nlicence')",
    "syntax": "def",
    "absent": "import no_such_module",
    "hook": _HOOK + "def nxdi_patchez(): return []",
    "argument": _HOOK + "def nxdi_patches(nothing): ...",
    "fails": _HOOK + "def nxdi_moe_families(): 1 / 0",
    "patches": _HOOK + "def nxdi_patches(families): 1 / 0",
    "kind": _HOOK + "def nxdi_moe_families(): return [1]",
    "number": _HOOK + "def nxdi_patches(): return 3",
    "family": (
        _HOOK + "def nxdi_moe_families():\n"
        "    return [MoEFamily(name='x', model_types=('x',), converter='nowhere')]"
    ),
}
SAYS = {
    "raises": "failed to load: RuntimeError: no licence",
    "syntax": "failed to load: SyntaxError",
    "absent": "failed to load: ModuleNotFoundError: No module named 'no_such_module'",
    "hook": "failed to load: PluginValidationError: unknown hook 'nxdi_patchez'",
    "argument": "failed to load: PluginValidationError",
    "fails": "failed: ZeroDivisionError",
    "patches": "failed: ZeroDivisionError",
    "kind": "nxdi_moe_families gives a int, not a MoEFamily",
    "number": "failed: TypeError",
    "family": "converter must be 'package.module:function' or '*.module:function', not 'nowhere'",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plugin_is_reported_on_one_line_and_takes_no_other_down(
    install: Install, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Names before and after it in the alphabet: what is loaded first must not matter.
    install(**{"good": GOOD, f"a_{name}": BROKEN[name], f"z_{name}": BROKEN[name]})

    nxdi_expertscale.activate()

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for prefix, line in zip("az", sorted(lines), strict=True):
        assert line.startswith(f"nxdi-expertscale: plugin '{prefix}_{name}'")
        assert SAYS[name] in line
    seams = {seam.seam for seam in nxdi_expertscale.status()}
    assert {"config", "state_dict:qwen3_moe", "state_dict:good"} <= seams


def test_unknown_name_is_reported_with_those_that_are_installed(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(good=GOOD)
    monkeypatch.setenv("NXDI_PLUGINS", "expertscale,gone")

    nxdi_expertscale.activate()

    error = capsys.readouterr().err
    assert error == ("nxdi-expertscale: no plugin is named 'gone' (installed: expertscale, good)\n")
    assert nxdi_expertscale.activation.active_plugins() == ("expertscale",)


FAMILY = """
from nxdi_expertscale import MoEFamily, hookimpl

@hookimpl
def nxdi_moe_families():
    return [MoEFamily(name={name!r}, model_types={types!r}, converter="m:convert")]
"""


@pytest.mark.parametrize(
    ("name", "types", "says"),
    [
        ("qwen3_moe", ("another",), "its name or claims it"),
        ("another", ("mine", "qwen3_moe"), "claims qwen3_moe"),
    ],
)
def test_family_that_is_taken_is_left_out_whoever_is_first_in_the_alphabet(
    install: Install, name: str, types: tuple[str, ...], says: str
) -> None:
    install(a_clash=FAMILY.format(name=name, types=types))

    plugins = load_plugins(None)

    assert names(plugins.families) == BUILT_IN
    (problem,) = plugins.problems
    assert problem.startswith(f"plugin 'a_clash': its family {name!r} is left out")
    assert says in problem


def test_patch_of_a_seam_that_is_taken_is_left_out_and_said_so(install: Install) -> None:
    install(
        a_clash="""
from nxdi_expertscale import Patch, hookimpl

@hookimpl
def nxdi_patches():
    return [Patch(seam="config", module="mine", attribute="convert", wrapper=print)]
"""
    )

    plugins = load_plugins(None)

    config = [patch for patch in plugins.patches if patch.seam == "config"]
    assert [patch.module for patch in config] == ["neuronx_distributed_inference.models.config"]
    assert plugins.problems == (
        "plugin 'a_clash': its patch 'config' is left out, another one has its name",
    )


def test_own_entry_point_names_the_package_of_patches() -> None:
    (point,) = importlib.metadata.entry_points(group="nxdi.plugins", name="expertscale")

    from nxdi_expertscale import patches

    assert point.load() is patches


def test_empty_variable_turns_everything_off_in_a_new_process() -> None:
    code = "import nxdi_expertscale; print(nxdi_expertscale.status())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"NXDI_PLUGINS": "", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )

    assert (done.stdout, done.stderr) == ("<Seams seams: 0>\n", "")
