"""What importing NxDI and vLLM-Neuron showed, and what became of the seams."""

from __future__ import annotations

from collections.abc import Iterator

from nxdi_expertscale.diagnostics import probe
from nxdi_expertscale.diagnostics.findings import Finding, problem, warning
from nxdi_expertscale.diagnostics.packages import NEURON_INDEX
from nxdi_expertscale.diagnostics.probe import Probe
from nxdi_expertscale.hooking.module_names import is_in_any_package
from nxdi_expertscale.hooking.patch import State
from nxdi_expertscale.patches import seams
from nxdi_expertscale.plugins.registry import families_in_force

NATIVE_VLLM_NEURON = (
    "this vLLM-Neuron is the native one (Neuron SDK 2.32 on), which does not run models through "
    "NxDI: it has no expert_wise_scale, and refuses this checkpoint; serve with vLLM-Neuron 0.2.0 "
    "to 0.5.0 (Neuron SDK 2.26 to 2.31), or with NxDI itself"
)


def check_imports(found: Probe) -> Iterator[Finding]:
    """Check that NxDI could be imported, and that vLLM-Neuron runs models through it."""
    if found.ended is not None:
        yield problem(f"the process that imports NxDI failed: {found.ended}")
    elif not found.has_nxdi:
        yield problem(
            f"NxDI is not installed: this Python finds no {probe.NXDI}; install it from "
            f"{NEURON_INDEX}"
        )
    if probe.VLLM_NEURON in found.failures:
        yield warning(f"vLLM-Neuron cannot be imported: {found.failures[probe.VLLM_NEURON]}")
    elif found.vllm_neuron_uses_nxdi is False:
        yield warning(NATIVE_VLLM_NEURON)


def check_seams(found: Probe) -> Iterator[Finding]:
    """Check that the seams that a user of the feature needs are patched, or need no patch.

    Of the families' state dicts one is enough: a release need not have every model.
    """
    needed = set(seams.needed_by_config())
    states = {seam.seam: seam.state for seam in found.seams}
    of_families = {seams.state_dict(family) for family in families_in_force()}
    if not any(states.get(name) in (State.APPLIED, State.NATIVE) for name in of_families):
        needed |= of_families
    for seam in found.seams:
        finding = problem if seam.seam in needed else warning
        if seam.state in (State.INCOMPATIBLE, State.PARTIAL):
            yield finding(f"the seam {seam.seam!r} does not fit: {seam.reason}")
        elif probe.is_of_vllm_neuron(seam.module) or is_in_any_package(seam.module):
            continue
        elif seam.state is State.WAITING and found.has_nxdi:
            reason = found.failures.get(seam.module, "it was imported, and not reported")
            yield finding(f"the seam {seam.seam!r}: {seam.module} cannot be imported: {reason}")
