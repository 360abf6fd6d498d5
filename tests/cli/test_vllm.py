"""The real vLLM's plugin loader, in a process of an installation."""

from __future__ import annotations

import importlib.util
import json
import logging

import pytest

from tests.harness.installed import Environment

LOAD = """
import json, logging, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
load_general_plugins()
import vllm.plugins
vllm.plugins.plugins_loaded = False
load_general_plugins()
logging.shutdown()
activation = sys.modules.get("nxdi_expertscale.activation")
print(json.dumps(list(activation.active_plugins()) if activation else None))
"""
"""Loads the plugins as vLLM does in each process, more than once, and prints what is active."""


@pytest.fixture
def with_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: pip install --no-deps vllm==0.11.0")


def loaded(environment: Environment, code: str = LOAD, **variables: str) -> tuple[object, str]:
    """What is active after vLLM has loaded its plugins, and what was logged."""
    result = environment.run("-c", code, **variables)
    assert result.returncode == 0, result.stderr
    *log, last = result.stdout.splitlines()
    return json.loads(last), "\n".join([*log, result.stderr])


@pytest.mark.usefixtures("with_vllm")
def test_vllm_activates_it(installed: Environment) -> None:
    plugins, log = loaded(installed)

    assert plugins == ["expertscale"]
    assert "Traceback" not in log


@pytest.mark.usefixtures("with_vllm")
def test_vllm_can_leave_it_out(installed: Environment) -> None:
    assert loaded(installed, VLLM_PLUGINS="another")[0] is None
    assert loaded(installed, VLLM_PLUGINS="another,nxdi_expertscale")[0] == ["expertscale"]


@pytest.mark.usefixtures("with_vllm")
def test_vllm_activates_what_the_variable_allows(installed: Environment) -> None:
    assert loaded(installed, NXDI_PLUGINS="")[0] == []


@pytest.mark.usefixtures("with_vllm")
def test_vllm_outlives_a_failure_of_ours(installed: Environment) -> None:
    break_it = """
import nxdi_expertscale.activation as activation
def fail():
    raise RuntimeError("broken installation")
activation.deactivate()
activation.registry.reload = fail
"""
    # The entry point itself is found and called.
    plugins, log = loaded(installed, break_it + LOAD)

    assert plugins == []
    assert "RuntimeError: broken installation" in log


def test_entry_point_never_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from nxdi_expertscale import activation, vllm

    def fail() -> None:
        raise RuntimeError("broken installation")

    monkeypatch.setattr(activation, "activate", fail)

    vllm.activate()

    (record,) = caplog.records
    assert (record.name, record.levelno) == ("nxdi_expertscale", logging.ERROR)
    assert record.exc_info is not None
