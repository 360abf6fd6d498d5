"""What ``doctor`` makes of versions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from nxdi_expertscale.activation import status
from nxdi_expertscale.diagnostics import doctor, probe
from nxdi_expertscale.hooking.patch import State


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A probe that finds everything in order; its versions may be changed."""
    versions = {probe.NXDI: "0.9.0", probe.NXD: "0.18.0"}
    monkeypatch.delenv("NXDI_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    seams = tuple(dataclasses.replace(seam, state=State.APPLIED) for seam in status())
    found = probe.Probe(seams=seams, versions=versions, has_nxdi=True)
    monkeypatch.setattr(probe, "run", lambda _limit: found)
    yield versions


def test_tested_release_has_no_warning(healthy: dict[str, str]) -> None:
    answer = doctor.examine()

    assert (answer.works, answer.warnings) == (True, ())
    assert answer.verdict == "yes: expert_wise_scale works here, with NxDI 0.9.0"
    assert answer.release == doctor.Release("0.9", "0.18", "2.29")


@pytest.mark.parametrize("version", ["0.10.1", "1.0", "0.4.2"])
def test_other_release_is_tried_with_a_warning(healthy: dict[str, str], version: str) -> None:
    healthy[probe.NXDI] = version

    answer = doctor.examine()

    assert (answer.works, answer.release) == (True, None)
    (warning,) = answer.warnings
    assert f"NxDI {version} is not a release that was tested (0.5 to 0.9)" in warning


def test_nxd_of_another_release_is_a_warning(healthy: dict[str, str]) -> None:
    healthy[probe.NXD] = "0.17.3+abc"

    answer = doctor.examine()

    assert answer.works
    (warning,) = answer.warnings
    assert "belongs to NxD 0.18" in warning
