"""What importing NxDI and vLLM-Neuron showed, and what became of the seams."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nxdi_expertscale.diagnostics import probe
from nxdi_expertscale.diagnostics.findings import Finding, problem, warning
from nxdi_expertscale.diagnostics.packages import NEURON_INDEX
from nxdi_expertscale.diagnostics.probe import Probe
from nxdi_expertscale.hooking.module_names import is_in_any_package
from nxdi_expertscale.hooking.patch import SeamStatus, State
from nxdi_expertscale.patches import seams
from nxdi_expertscale.plugins.registry import families_in_force

_OF_NEURON = {
    probe.NXDI: "neuronx-distributed-inference",
    probe.NXD: "neuronx-distributed",
    "libneuronxla": "libneuronxla",
    "neuronxcc": "neuronx-cc",
    "nki": "neuronx-cc",
    "torch_neuronx": "torch-neuronx",
    "torch_xla": "torch-neuronx",
}
"""What to install from Neuron's index, by the package that is missing."""

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
            f"NxDI is not installed: this Python finds no {probe.NXDI}; {_command(probe.NXDI)}"
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
    unreachable: dict[str, list[SeamStatus]] = {}
    for seam in found.seams:
        if seam.state in (State.INCOMPATIBLE, State.PARTIAL):
            finding = problem if seam.seam in needed else warning
            yield finding(f"the seam {seam.seam!r} does not fit: {seam.reason}")
        elif probe.is_of_vllm_neuron(seam.module) or is_in_any_package(seam.module):
            continue
        elif seam.state is State.WAITING and found.has_nxdi:
            reason = found.failures.get(seam.module, "it was imported, and not reported")
            unreachable.setdefault(_cause(reason), []).append(seam)
    for cause, seams_of_it in unreachable.items():
        finding = problem if needed & {seam.seam for seam in seams_of_it} else warning
        modules = list(dict.fromkeys(seam.module for seam in seams_of_it))
        more = f" (and {len(modules) - 1} more)" if modules[1:] else ""
        yield finding(f"{modules[0]}{more} cannot be imported: {cause}")


def _cause(reason: str) -> str:
    """Why modules cannot be imported, the same for all that miss the same package."""
    missing = re.search(r"No module named '([\w.]+)'", reason)
    if missing is None:
        return reason
    package = missing[1].partition(".")[0]
    if package in (probe.NXDI, probe.NXD) and package != missing[1]:
        return f"parts of {package} are missing; {_command(package)}"
    return f"{package} is not installed; {_command(package)}"


def _command(package: str) -> str:
    """The command that installs what brings a package."""
    if package in _OF_NEURON:
        return f"pip install --extra-index-url {NEURON_INDEX} {_OF_NEURON[package]}"
    return f"pip install {package}"
