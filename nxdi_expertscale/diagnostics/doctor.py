"""Whether expert-wise FP8 scales will work in this environment, and if not why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nxdi_expertscale.diagnostics import probe
from nxdi_expertscale.diagnostics.device import check_device, describe_device
from nxdi_expertscale.diagnostics.packages import (
    NXDI,
    VLLM,
    check_packages,
    check_vllm,
    installed_versions,
)
from nxdi_expertscale.diagnostics.probe import Probe
from nxdi_expertscale.diagnostics.releases import Release, release_of
from nxdi_expertscale.diagnostics.upstream import check_imports, check_seams
from nxdi_expertscale.diagnostics.ways_in import check_ways_in, ways_in
from nxdi_expertscale.errors import counted
from nxdi_expertscale.hooking.patch import SeamStatus

if TYPE_CHECKING:
    from nxdi_expertscale.diagnostics.model_check import ModelReport

TIME_LIMIT = 300.0
"""Seconds for importing NxDI; on a cold disk it takes more than a minute."""


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
        activation: Whether the plugin is activated, by the way in.
        device: What the environment says of the device.
        model: What is known of the model that was asked about, by name; empty without one.
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
    model: Mapping[str, str]


def examine(time_limit: float = TIME_LIMIT, model: ModelReport | None = None) -> Examination:
    """Examine this environment; NxDI is imported in a child process.

    Args:
        time_limit: Seconds that importing NxDI may take.
        model: What was found of a model that is to run here.
    """
    return judge(probe.run(time_limit), model)


def judge(found: Probe, model: ModelReport | None = None) -> Examination:
    """Judge this environment by what importing NxDI showed.

    Args:
        found: What a child process found.
        model: What was found of a model that is to run here.
    """
    versions = installed_versions(found.versions)
    has_vllm = versions[VLLM] is not None
    findings = [
        *check_packages(versions),
        *(check_vllm(versions) if found.vllm_neuron_uses_nxdi else ()),
        *check_imports(found, versions),
        *check_seams(found, versions, model.family if model is not None else None),
        *check_ways_in(found, has_vllm=has_vllm),
        *check_device(),
        *(model.findings if model is not None else ()),
    ]
    problems = tuple(finding.text for finding in findings if finding.is_problem)
    warnings = tuple(finding.text for finding in findings if not finding.is_problem)
    return Examination(
        works=not problems,
        verdict=_verdict(
            problems,
            warnings,
            versions[NXDI],
            is_native=found.vllm_neuron_uses_nxdi is False,
        ),
        problems=problems,
        warnings=warnings,
        packages=versions,
        release=release_of(versions[NXDI]),
        seams=found.seams,
        activation=ways_in(found, has_vllm=has_vllm),
        device=describe_device(),
        model=model.rows if model is not None else {},
    )


def _verdict(
    problems: Sequence[str], warnings: Sequence[str], nxdi: str | None, *, is_native: bool
) -> str:
    if is_native:
        directly = "no" if problems else "yes"
        return (
            "no with vLLM: the native vLLM-Neuron has no NxDI, and refuses this checkpoint; "
            f"{directly} without it, with NxDI {nxdi or '(which is not here)'}"
        )
    if problems:
        return f"no: expert_wise_scale will not work here ({counted(len(problems), 'problem')})"
    hedge = f", with {counted(len(warnings), 'warning')}" if warnings else ""
    return f"yes{hedge}: expert_wise_scale works here, with NxDI {nxdi}"
