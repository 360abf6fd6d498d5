"""The three ways in which the plugin is activated, and which of them are open here."""

from __future__ import annotations

import os
from collections.abc import Iterator

from nxdi_expertscale.diagnostics.findings import Finding, problem, warning
from nxdi_expertscale.diagnostics.probe import Probe
from nxdi_expertscale.plugins.manager import ALLOW_LIST_VARIABLE, OWN_PLUGIN, allowed_names

VLLM_ALLOW_LIST_VARIABLE = "VLLM_PLUGINS"
VLLM_PLUGIN = "nxdi_expertscale"


def ways_in(found: Probe, *, has_vllm: bool) -> dict[str, str]:
    """Whether each way is open, and if not why.

    Args:
        found: What a new process found.
        has_vllm: Whether vLLM is installed.
    """
    value = os.environ.get(ALLOW_LIST_VARIABLE)
    if value is None:
        at_start = f"no: {ALLOW_LIST_VARIABLE} is unset"
    elif found.activated_at_start:
        at_start = f"yes: {ALLOW_LIST_VARIABLE}={value}"
    else:
        at_start = f"no, though {ALLOW_LIST_VARIABLE}={value!r}"
    by_import = "yes" if _is_allowed() else f"no: {ALLOW_LIST_VARIABLE}={value!r}"
    if not has_vllm:
        by_vllm = "vLLM is not installed"
    elif not _vllm_allows_it():
        by_vllm = f"no: {VLLM_ALLOW_LIST_VARIABLE} does not name {VLLM_PLUGIN}"
    else:
        by_vllm = by_import
    return {
        "at interpreter start": at_start,
        "by import nxdi_expertscale": by_import,
        "by vLLM": by_vllm,
    }


def check_ways_in(found: Probe, *, has_vllm: bool) -> Iterator[Finding]:
    """Check that no variable keeps the plugin from being activated.

    Args:
        found: What a new process found.
        has_vllm: Whether vLLM is installed.
    """
    if not _is_allowed():
        yield problem(
            f"{ALLOW_LIST_VARIABLE}={os.environ[ALLOW_LIST_VARIABLE]!r} turns the plugin off; "
            f"add {OWN_PLUGIN}, or unset it"
        )
    elif allowed_names() is not None and not found.activated_at_start and found.ended is None:
        yield warning(
            f"{ALLOW_LIST_VARIABLE} is set, and nothing is activated at interpreter start: the "
            "start-up file is not in a site-packages folder of this Python; install the package "
            "with pip, or import nxdi_expertscale"
        )
    yield from map(warning, found.plugin_problems)
    if has_vllm and not _vllm_allows_it() and allowed_names() is None:
        yield problem(
            f"{VLLM_ALLOW_LIST_VARIABLE}={os.environ[VLLM_ALLOW_LIST_VARIABLE]!r} keeps vLLM from "
            f"activating it; add {VLLM_PLUGIN}, or set {ALLOW_LIST_VARIABLE}={OWN_PLUGIN}"
        )


def _is_allowed() -> bool:
    allowed = allowed_names()
    return allowed is None or OWN_PLUGIN in allowed


def _vllm_allows_it() -> bool:
    # vLLM: plugins/__init__.py, load_plugins_by_group.
    value = os.environ.get(VLLM_ALLOW_LIST_VARIABLE)
    return value is None or VLLM_PLUGIN in value.split(",")
