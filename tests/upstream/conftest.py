"""Every test here runs once for each target, in the process of that target."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.harness import models, targets
from tests.upstream import workers


def pytest_configure(config: pytest.Config) -> None:
    here = targets.target_of_this_process()
    if here is not None:
        here.prepare()
    descriptor = os.environ.pop(workers.REPORTS_VARIABLE, None)
    if descriptor is not None:
        config.pluginmanager.register(workers.ReportWriter(config, int(descriptor)))
    config.pluginmanager.register(workers.Dispatcher(None if here is None else here.name))


# First, so that a test has the same name whether this file is loaded at once or while collecting:
# the worker is given the names.
@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target_name" in metafunc.fixturenames:
        metafunc.parametrize("target_name", list(targets.all_targets()), scope="session")


@pytest.fixture(scope="session", autouse=True)
def target(target_name: str) -> targets.Target:
    """The NxDI that can be imported in this process."""
    return targets.all_targets()[target_name]


@pytest.fixture(autouse=True)
def _activation(target: targets.Target, request: pytest.FixtureRequest) -> None:
    """The patches, in force for a test that asks for them, and for no other.

    They stay between two tests that both ask: looking for all that holds a patched function takes
    as long as many a test.
    """
    import nxdi_expertscale

    if "active" in request.fixturenames:
        nxdi_expertscale.activate()
    else:
        nxdi_expertscale.deactivate()


@pytest.fixture
def active(_activation: None) -> None:
    """The patches, in force for one test."""


@pytest.fixture(scope="session")
def one_rank(target: targets.Target, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """NxD's parallel state for a single rank."""
    from nxdi_expertscale.testing import ranks

    with ranks.parallel_state(0, 1, tmp_path_factory.mktemp("rank") / "store"):
        yield


@pytest.fixture(scope="session")
def nxdi(one_rank: None) -> ModuleType:
    """The steps through NxDI, with a parallel state of one rank."""
    from tests.harness import running

    return running


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 MoE whose experts differ in magnitude by a factor of 16."""
    return models.save_qwen3_moe(tmp_path_factory.mktemp("models") / "moe", spread=16.0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests record, for each target."""
    figures: dict[str, dict[str, float]] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties if report.when == "call" else ():
            where = report.nodeid.partition("[")[2].rstrip("]")
            if isinstance(value, float):
                figures.setdefault(name, {})[where] = value
    if figures:
        terminalreporter.section("figures")
    for name, values in figures.items():
        line = "  ".join(f"{where} {value:.2%}" for where, value in values.items())
        terminalreporter.write_line(f"{name}:  {line}")
