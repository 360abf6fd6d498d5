"""The families that are in force: loaded once, until what is allowed or installed has changed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import nxdi_expertscale
from nxdi_expertscale.families.built_in import BUILT_IN
from nxdi_expertscale.plugins.registry import PluginRegistry, families_in_force

Install = Callable[..., None]

COUNTING = """
import sys
from nxdi_expertscale import MoEFamily, hookimpl

@hookimpl
def nxdi_moe_families():
    sys.calls.append("families")
    return [MoEFamily(name={name!r}, model_types=({name!r},), converter="models:convert")]
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that a plugin of ``COUNTING`` is asked for its families."""
    made: list[str] = []
    monkeypatch.setattr(sys, "calls", made, raising=False)
    return made


def names() -> list[str]:
    return [family.name for family in families_in_force()]


BUILT_IN_NAMES = [family.name for family in BUILT_IN]


def test_plugins_are_loaded_once_however_often_the_families_are_asked_for(
    install: Install, calls: list[str]
) -> None:
    install(mine=COUNTING.format(name="mine"))

    assert names() == names() == [*BUILT_IN_NAMES, "mine"]
    assert len(calls) == 1


def test_families_follow_the_variable(
    install: Install, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(mine=COUNTING.format(name="mine"))

    monkeypatch.setenv("NXDI_PLUGINS", "expertscale")
    assert names() == BUILT_IN_NAMES
    assert calls == []
    monkeypatch.setenv("NXDI_PLUGINS", "mine")
    assert names() == ["mine"]
    monkeypatch.setenv("NXDI_PLUGINS", "")
    assert names() == []
    monkeypatch.delenv("NXDI_PLUGINS")
    assert names() == [*BUILT_IN_NAMES, "mine"]


@pytest.mark.parametrize(
    "renew", [nxdi_expertscale.activate, nxdi_expertscale.deactivate], ids=lambda f: f.__name__
)
def test_plugin_that_was_installed_since_is_found(
    install: Install, calls: list[str], renew: Callable[[], None]
) -> None:
    install(first=COUNTING.format(name="first"))
    nxdi_expertscale.activate()
    assert names() == [*BUILT_IN_NAMES, "first"]
    install(second=COUNTING.format(name="second"))

    renew()

    assert names() == [*BUILT_IN_NAMES, "first", "second"]


def test_problem_is_printed_once_also_where_nothing_is_activated(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NXDI_PLUGINS", "expertscale,gone")
    problem = "nxdi-expertscale: no plugin is named 'gone' (installed: expertscale)\n"

    assert names() == BUILT_IN_NAMES
    assert capsys.readouterr().err == problem
    nxdi_expertscale.activate()
    monkeypatch.setenv("NXDI_PLUGINS", "gone")
    assert names() == []
    assert capsys.readouterr().err == ""


def test_many_threads_see_the_same_families_and_print_a_problem_once(
    install: Install, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    install(mine=COUNTING.format(name="mine"), broken="1 / 0")
    registry = PluginRegistry()
    start = threading.Barrier(8)

    def ask(number: int) -> list[str]:
        start.wait(30)
        plugins = registry.reload() if number % 2 else registry.plugins()
        return [family.name for family in plugins.families]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))

    assert found == [[*BUILT_IN_NAMES, "mine"]] * 8
    assert capsys.readouterr().err.count("plugin 'broken' failed to load") == 1


def test_plugin_that_waits_for_an_import_of_another_thread_does_not_hang_it(
    install: Install, write_module: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other, were the registry locked while it loads a plugin."""
    begun, go_on = threading.Event(), threading.Event()
    registry = PluginRegistry()
    monkeypatch.setattr(sys, "registry", registry, raising=False)
    monkeypatch.setattr(sys, "begun", begun, raising=False)
    monkeypatch.setattr(sys, "go_on", go_on, raising=False)
    monkeypatch.setenv("NXDI_PLUGINS", "waiting")
    write_module(
        library="""
            import sys
            sys.begun.set()
            sys.go_on.wait(30)
            sys.registry.plugins()
        """
    )
    install(waiting="import sys\nsys.go_on.set()\nimport library\n")
    importer = threading.Thread(target=__import__, args=["library"], daemon=True)
    importer.start()
    assert begun.wait(30)
    asker = threading.Thread(target=registry.plugins, daemon=True)
    asker.start()

    importer.join(30)
    asker.join(30)

    assert not importer.is_alive()
    assert not asker.is_alive()


def test_own_plugin_is_there_without_installed_metadata() -> None:
    code = (
        "import importlib.metadata; importlib.metadata.entry_points = lambda group: []\n"
        "from nxdi_expertscale.plugins.registry import families_in_force\n"
        "print(*(family.name for family in families_in_force()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == BUILT_IN_NAMES
