"""The seams that a user of the feature cannot do without."""

from __future__ import annotations

import pytest

import nxdi_expertscale
from nxdi_expertscale.patches import seams


def test_seam_that_is_not_patched_is_refused_with_its_name_and_what_to_do() -> None:
    nxdi_expertscale.activate()

    seams.require_seams([seams.CONFIG])
    with pytest.raises(
        nxdi_expertscale.IncompatibleUpstreamError,
        match=r"^expert_wise_scale cannot work with this NxDI: seam 'state_dict:gone': .*doctor",
    ):
        seams.require_seams([seams.CONFIG, "state_dict:gone"])
