"""How ``doctor`` judges what is installed."""

from __future__ import annotations

import dataclasses

import pytest

from nxdi_expertscale.activation import status
from nxdi_expertscale.diagnostics import doctor, probe
from nxdi_expertscale.diagnostics.probe import Probe
from nxdi_expertscale.diagnostics.releases import Release
from nxdi_expertscale.hooking.patch import State


@pytest.fixture(autouse=True)
def _no_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NXDI_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def healthy(nxdi: str, nxd: str = "0.18.0") -> Probe:
    """A probe that finds these versions, and everything in order."""
    seams = tuple(dataclasses.replace(seam, state=State.APPLIED) for seam in status())
    return Probe(seams=seams, versions={probe.NXDI: nxdi, probe.NXD: nxd}, has_nxdi=True)


def test_tested_release_has_no_warning() -> None:
    answer = doctor.judge(healthy("0.9.0"))

    assert (answer.works, answer.warnings) == (True, ())
    assert answer.verdict == "yes: expert_wise_scale works here, with NxDI 0.9.0"
    assert answer.release == Release("0.9", "0.18", "2.29")


@pytest.mark.parametrize("version", ["0.10.1", "1.0", "0.4.2"])
def test_other_release_is_tried_with_a_warning(version: str) -> None:
    answer = doctor.judge(healthy(version))

    assert (answer.works, answer.release) == (True, None)
    (warning,) = answer.warnings
    assert f"NxDI {version} is not a release that was tested (0.5 to 0.9)" in warning


def test_nxd_of_another_release_is_a_warning() -> None:
    answer = doctor.judge(healthy("0.9.0", nxd="0.17.3+abc"))

    assert answer.works
    (warning,) = answer.warnings
    assert "belongs to NxD 0.18" in warning
