"""Will it work here, and if not why: what is installed, what is patched, what is wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nxdi_expertscale.diagnostics import probe
from nxdi_expertscale.diagnostics.probe import Probe
from nxdi_expertscale.hooking.patch import SeamStatus, State
from nxdi_expertscale.patches import seams
from nxdi_expertscale.plugins.manager import ALLOW_LIST_VARIABLE, OWN_PLUGIN, allowed_names
from nxdi_expertscale.plugins.registry import families_in_force
from nxdi_expertscale.settings import device_variables
from nxdi_expertscale.version import __version__

TIME_LIMIT = 300.0
"""Seconds for importing NxDI; on a cold disk it takes more than a minute."""

VLLM_ALLOW_LIST_VARIABLE = "VLLM_PLUGINS"
VLLM_PLUGIN = "nxdi_expertscale"
LOGICAL_NC_VARIABLE = "NEURON_LOGICAL_NC_CONFIG"

_NXDI = "neuronx-distributed-inference"
_NXD = "neuronx-distributed"
_TORCH_NEURONX = "torch-neuronx"
_DISTRIBUTIONS = ("torch", "transformers", _NXDI, _NXD, _TORCH_NEURONX, "vllm", "vllm-neuron")
_NEURON_INDEX = "https://pip.repos.neuron.amazonaws.com"


@dataclass(frozen=True)
class Release:
    """A release of NxDI that the package is tested on.

    Attributes:
        nxdi: Its version's first two numbers.
        nxd: The same of the NxD that belongs to it.
        sdk: The Neuron SDK that it is part of.
    """

    nxdi: str
    nxd: str
    sdk: str


RELEASES = (
    Release("0.5", "0.14", "2.25"),
    Release("0.6", "0.15", "2.26"),
    Release("0.7", "0.16", "2.27"),
    Release("0.8", "0.17", "2.28"),
    Release("0.9", "0.18", "2.29"),
)


@dataclass(frozen=True)
class Examination:
    """What ``doctor`` found.

    Attributes:
        works: Whether ``expert_wise_scale=True`` will work here.
        verdict: The answer in one line.
        problems: Why it will not.
        warnings: What will not stop it, and should be known.
        packages: Versions by name; None where a package is absent.
        release: The tested release that is installed, if it is one.
        seams: What became of each patch once NxDI was imported.
        activation: How activation will happen, by the way in.
        device: What the environment says of the device.
    """

    works: bool
    verdict: str
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    packages: Mapping[str, str | None]
    release: Release | None
    seams: tuple[SeamStatus, ...]
    activation: Mapping[str, str]
    device: Mapping[str, str]


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def examine(time_limit: float = TIME_LIMIT) -> Examination:
    """Look at this environment; NxDI is imported in a child process.

    Args:
        time_limit: Seconds that importing NxDI may take.
    """
    found = probe.run(time_limit)
    packages = _packages(found)
    release = _release(packages[_NXDI])
    findings = _Findings()
    _check_packages(packages, release, findings)
    _check_import(found, findings)
    _check_seams(found, findings)
    _check_activation(packages, found, findings)
    _check_device(findings)
    return Examination(
        works=not findings.problems,
        verdict=_verdict(findings, packages[_NXDI]),
        problems=tuple(findings.problems),
        warnings=tuple(findings.warnings),
        packages=packages,
        release=release,
        seams=found.seams,
        activation=_ways_in(packages, found),
        device=_device(),
    )


def _verdict(findings: _Findings, nxdi: str | None) -> str:
    if findings.problems:
        return f"no: expert_wise_scale will not work here ({_count(findings.problems, 'problem')})"
    if findings.warnings:
        warnings = _count(findings.warnings, "warning")
        return f"yes, with {warnings}: expert_wise_scale works here, with NxDI {nxdi}"
    return f"yes: expert_wise_scale works here, with NxDI {nxdi}"


def _count(lines: Sequence[str], what: str) -> str:
    return f"{len(lines)} {what}{'' if len(lines) == 1 else 's'}"


def _packages(found: Probe) -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "nxdi-expertscale": __version__,
        "python": platform.python_version(),
    }
    for name in _DISTRIBUTIONS:
        distribution = _distribution(name)
        versions[name] = None if distribution is None else distribution.version
    # A source tree has no metadata, and its package says its version itself.
    for name, module in ((_NXDI, probe.NXDI), (_NXD, probe.NXD)):
        if versions[name] is None:
            versions[name] = found.versions.get(module) or None
    return versions


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_placeholder(name: str) -> bool:
    """Whether a distribution is the public index's, whose only module says that it is wrong."""
    distribution = _distribution(name)
    files = distribution.files if distribution is not None else None
    return [file.name for file in files or () if file.suffix == ".py"] == ["__init__.py"]


def _release(nxdi: str | None) -> Release | None:
    number = _minor(nxdi)
    return next((release for release in RELEASES if release.nxdi == number), None)


def _minor(version: str | None) -> str | None:
    match = re.match(r"\d+\.\d+", version or "")
    return match[0] if match else None


def _check_packages(
    packages: Mapping[str, str | None], release: Release | None, findings: _Findings
) -> None:
    for name in (_NXDI, _NXD, _TORCH_NEURONX):
        if _is_placeholder(name):
            findings.problems.append(
                f"{name} {packages[name]} is the public index's placeholder, not the real "
                f"package; pip uninstall {name}, and install it from {_NEURON_INDEX}"
            )
    if packages["torch"] is None:
        findings.problems.append("torch is not installed; install the one that NxDI asks for")
    nxdi, nxd = packages[_NXDI], packages[_NXD]
    if nxdi is None:
        return
    if release is None:
        first, last = RELEASES[0].nxdi, RELEASES[-1].nxdi
        findings.warnings.append(
            f"NxDI {nxdi} is not a release that was tested ({first} to {last}): what counts is "
            "whether its seams fit"
        )
    elif nxd is not None and _minor(nxd) != release.nxd:
        findings.warnings.append(
            f"NxDI {nxdi} belongs to NxD {release.nxd} (Neuron SDK {release.sdk}), and NxD {nxd} "
            "is installed"
        )


def _check_import(found: Probe, findings: _Findings) -> None:
    if found.ended is not None:
        findings.problems.append(f"the process that imports NxDI failed: {found.ended}")
    elif not found.has_nxdi:
        findings.problems.append(
            f"NxDI is not installed: this Python finds no {probe.NXDI}; install it from "
            f"{_NEURON_INDEX}"
        )
    if probe.VLLM_NEURON in found.failures:
        findings.warnings.append(
            f"vLLM-Neuron cannot be imported: {found.failures[probe.VLLM_NEURON]}"
        )
    elif found.vllm_neuron_uses_nxdi is False:
        findings.warnings.append(
            "this vLLM-Neuron does not run models through NxDI: with it there is nothing to "
            "patch, and expert_wise_scale is unknown"
        )


def _check_seams(found: Probe, findings: _Findings) -> None:
    needed = set(seams.needed_by_config())
    states = {seam.seam: seam.state for seam in found.seams}
    of_families = {seams.state_dict(family) for family in families_in_force()}
    if not any(states.get(name) in (State.APPLIED, State.NATIVE) for name in of_families):
        needed |= of_families
    for seam in found.seams:
        to = findings.problems if seam.seam in needed else findings.warnings
        if seam.state is State.INCOMPATIBLE:
            to.append(f"the seam {seam.seam!r} does not fit: {seam.reason}")
        elif seam.state is State.WAITING and found.has_nxdi:
            reason = found.failures.get(seam.module, "it was imported, and not reported")
            to.append(f"the seam {seam.seam!r}: {seam.module} cannot be imported: {reason}")


def _check_activation(
    packages: Mapping[str, str | None], found: Probe, findings: _Findings
) -> None:
    allowed = allowed_names()
    if allowed is not None and OWN_PLUGIN not in allowed:
        findings.problems.append(
            f"{ALLOW_LIST_VARIABLE}={os.environ[ALLOW_LIST_VARIABLE]!r} turns the plugin off; "
            f"add {OWN_PLUGIN}, or unset it"
        )
    elif allowed is not None and not found.activated_at_start and found.ended is None:
        findings.warnings.append(
            f"{ALLOW_LIST_VARIABLE} is set, and nothing is activated at interpreter start: the "
            "start-up file is not in a site-packages folder of this Python; install the package "
            "with pip, or import nxdi_expertscale"
        )
    findings.warnings.extend(found.plugin_problems)
    if packages["vllm"] is not None and not _vllm_loads_it() and allowed is None:
        findings.problems.append(
            f"{VLLM_ALLOW_LIST_VARIABLE}={os.environ[VLLM_ALLOW_LIST_VARIABLE]!r} keeps vLLM from "
            f"activating it; add {VLLM_PLUGIN}, or set {ALLOW_LIST_VARIABLE}={OWN_PLUGIN}"
        )


def _vllm_loads_it() -> bool:
    # vLLM: plugins/__init__.py, load_plugins_by_group.
    value = os.environ.get(VLLM_ALLOW_LIST_VARIABLE)
    return value is None or VLLM_PLUGIN in value.split(",")


def _ways_in(packages: Mapping[str, str | None], found: Probe) -> dict[str, str]:
    value = os.environ.get(ALLOW_LIST_VARIABLE)
    if value is None:
        at_start = f"no: {ALLOW_LIST_VARIABLE} is unset"
    elif found.activated_at_start:
        at_start = f"yes: {ALLOW_LIST_VARIABLE}={value}"
    else:
        at_start = f"no, though {ALLOW_LIST_VARIABLE}={value!r}"
    allowed = allowed_names()
    is_allowed = allowed is None or OWN_PLUGIN in allowed
    switched_off = f"no: {ALLOW_LIST_VARIABLE}={value!r}"
    if packages["vllm"] is None:
        in_vllm = "vLLM is not installed"
    elif not _vllm_loads_it():
        in_vllm = f"no: {VLLM_ALLOW_LIST_VARIABLE} does not name {VLLM_PLUGIN}"
    else:
        in_vllm = "yes" if is_allowed else switched_off
    return {
        "at interpreter start": at_start,
        "by import nxdi_expertscale": "yes" if is_allowed else switched_off,
        "by vLLM": in_vllm,
    }


def _check_device(findings: _Findings) -> None:
    findings.warnings.extend(device_variables.find_conflicts())
    cores = os.environ.get(LOGICAL_NC_VARIABLE, "2")
    if cores != "2":
        findings.warnings.append(
            f"{LOGICAL_NC_VARIABLE}={cores!r}: expert_wise_scale needs 2 where the blockwise "
            "kernel runs"
        )


def _device() -> dict[str, str]:
    devices = sum(1 for _ in _neuron_devices())
    return {
        "Neuron devices": str(devices) if devices else "none: compiled models cannot be run here",
        LOGICAL_NC_VARIABLE: os.environ.get(LOGICAL_NC_VARIABLE, "unset"),
        **{
            name: os.environ.get(name, "unset: expert_wise_scale with FP8 sets it")
            for name in device_variables.VARIABLES
        },
    }


def _neuron_devices() -> Iterator[Path]:
    return Path("/dev").glob("neuron[0-9]*")
