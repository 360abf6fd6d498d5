"""What importing NxDI and vLLM-Neuron showed, and what became of the seams."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from nxdi_expertscale.diagnostics import probe
from nxdi_expertscale.diagnostics.findings import Finding, problem, warning
from nxdi_expertscale.diagnostics.packages import NXD, NXDI, find_mismatches, install_command
from nxdi_expertscale.diagnostics.probe import Probe
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.module_names import is_in_any_package
from nxdi_expertscale.hooking.patch import SeamStatus, State
from nxdi_expertscale.patches import seams
from nxdi_expertscale.plugins.registry import families_in_force

_OF_NEURON = {
    probe.NXDI: NXDI,
    probe.NXD: NXD,
    "libneuronxla": "libneuronxla",
    "neuronxcc": "neuronx-cc",
    "nki": "neuronx-cc",
    "nkilib": "neuronx-cc",
    "torch_neuronx": "torch-neuronx",
    "torch_xla": "torch-neuronx",
}
"""What to install from Neuron's index, by the package that is missing."""

NATIVE_VLLM_NEURON = (
    "this vLLM-Neuron is the native one (Neuron SDK 2.32 on), which does not run models through "
    "NxDI: it has no expert_wise_scale, and refuses this checkpoint; serve with vLLM-Neuron 0.2.0 "
    "to 0.5.0 (Neuron SDK 2.26 to 2.31), or with NxDI itself"
)


def check_imports(found: Probe, versions: Mapping[str, str | None]) -> Iterator[Finding]:
    """Check that NxDI could be imported, and that vLLM-Neuron runs models through it.

    Args:
        found: What a child process found.
        versions: Versions of the installed packages, by name.
    """
    if found.ended is not None:
        yield problem(f"the process that imports NxDI failed: {found.ended}")
    elif not found.has_nxdi:
        yield problem(
            f"NxDI is not installed: this Python finds no {probe.NXDI}; "
            f"{install_command(NXDI, versions)}"
        )
    if probe.VLLM_NEURON in found.failures:
        yield warning(f"vLLM-Neuron cannot be imported: {found.failures[probe.VLLM_NEURON]}")
    elif found.vllm_neuron_uses_nxdi is False:
        yield warning(NATIVE_VLLM_NEURON)


def check_seams(
    found: Probe, versions: Mapping[str, str | None], family: MoEFamily | None = None
) -> Iterator[Finding]:
    """Check that the seams that a user of the feature needs are patched, or need no patch.

    Of the families' state dicts one is enough, unless a model is named: a release need not have
    every model. Where packages do not belong together, that is the cause of what does not fit or
    cannot be imported, and is what is told.

    Args:
        found: What a child process found.
        versions: Versions of the installed packages, by name.
        family: The family of the model that is to run.
    """
    needed = set(seams.needed_by_model(family) if family else seams.needed_by_config())
    states = {seam.seam: seam.state for seam in found.seams}
    of_families = {seams.state_dict(family) for family in families_in_force()}
    if not any(states.get(name) in (State.APPLIED, State.NATIVE) for name in of_families):
        needed |= of_families
    mismatches = list(find_mismatches(versions))
    symptoms = [*_misfits(found, needed), *_failed_imports(found, needed)]
    worst = next((symptom for symptom in symptoms if symptom.is_problem), None)
    if mismatches and worst is not None:
        yield problem(f"{mismatches[0]} (seen in this: {worst.text})")
        yield from map(problem, mismatches[1:])
    else:
        yield from map(warning, mismatches)
        yield from symptoms
    yield from _absent_packages(found, needed, versions)
    yield from _without_its_code(found, family)


def _misfits(found: Probe, needed: set[str]) -> Iterator[Finding]:
    for seam in found.seams:
        if seam.state in (State.INCOMPATIBLE, State.PARTIAL):
            finding = problem if seam.seam in needed else warning
            yield finding(f"the seam {seam.seam!r} does not fit: {seam.reason}")


def _failed_imports(found: Probe, needed: set[str]) -> Iterator[Finding]:
    """What cannot be imported though all packages are there, by cause."""
    for reason, waiting in _unreachable(found).items():
        if _absent_package(reason) is None:
            yield _not_importable(waiting, needed, reason)


def _absent_packages(
    found: Probe, needed: set[str], versions: Mapping[str, str | None]
) -> Iterator[Finding]:
    """The packages without which modules cannot be imported."""
    by_package: dict[tuple[str, bool], list[SeamStatus]] = {}
    for reason, waiting in _unreachable(found).items():
        absent = _absent_package(reason)
        if absent is not None:
            by_package.setdefault(absent, []).extend(waiting)
    for (package, is_whole), waiting in by_package.items():
        what = f"{package} is not installed" if is_whole else f"parts of {package} are missing"
        neuron = _OF_NEURON.get(package)
        command = f"pip install {package}" if neuron is None else install_command(neuron, versions)
        yield _not_importable(waiting, needed, f"{what}; {command}")


def _unreachable(found: Probe) -> dict[str, list[SeamStatus]]:
    """The seams of NxDI and NxD whose modules could not be imported, by the reason."""
    unreachable: dict[str, list[SeamStatus]] = {}
    for seam in found.seams:
        if probe.is_of_vllm_neuron(seam.module) or is_in_any_package(seam.module):
            continue
        if seam.state is State.WAITING and found.has_nxdi:
            reason = found.failures.get(seam.module, "it was imported, and not reported")
            unreachable.setdefault(reason, []).append(seam)
    return unreachable


def _not_importable(waiting: list[SeamStatus], needed: set[str], cause: str) -> Finding:
    finding = problem if needed & {seam.seam for seam in waiting} else warning
    modules = list(dict.fromkeys(seam.module for seam in waiting))
    more = f" (and {len(modules) - 1} more)" if modules[1:] else ""
    return finding(f"{modules[0]}{more} cannot be imported: {cause}")


def _absent_package(reason: str) -> tuple[str, bool] | None:
    """The package that a module misses, and whether all of it is absent; None for another cause."""
    missing = re.search(r"No module named '([\w.]+)'", reason)
    if missing is None:
        return None
    package = missing[1].partition(".")[0]
    return package, package not in (probe.NXDI, probe.NXD) or package == missing[1]


def _without_its_code(found: Probe, family: MoEFamily | None) -> Iterator[Finding]:
    """Say of a contributed model that its code has to come with it."""
    if family is None:
        return
    for seam in found.seams:
        if seam.seam == seams.state_dict(family) and is_in_any_package(seam.module):
            yield warning(
                f"NxDI itself has no {family.name}: {seam.module.rpartition('.')[2]}.py of its "
                "contribution has to be there, and is patched when it is imported"
            )
