"""The seams that a user of the feature cannot do without."""

from __future__ import annotations

import pytest

import nxdi_expertscale
from nxdi_expertscale.errors import IncompatibleUpstreamError
from nxdi_expertscale.families.built_in import BUILT_IN
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.patch import SeamStatus, State
from nxdi_expertscale.loading.layout import LayoutError
from nxdi_expertscale.patches import required_seams, seams


def test_seam_that_is_not_patched_is_refused_with_its_name_and_what_to_do() -> None:
    nxdi_expertscale.activate()

    required_seams.require_seams([seams.CONFIG])
    with pytest.raises(
        nxdi_expertscale.IncompatibleUpstreamError,
        match=r"^expert_wise_scale cannot work with this NxDI: seam 'state_dict:gone': .*doctor",
    ):
        required_seams.require_seams([seams.CONFIG, "state_dict:gone"])


PLUGINS = MoEFamily(name="plugins", model_types=("plugins",), converter="gone:convert")


def test_author_of_a_family_is_told_of_its_declaration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(required_seams, "families_in_force", lambda: (*BUILT_IN, PLUGINS))
    monkeypatch.setattr(
        required_seams.engine,
        "find_failed_seam",
        lambda names, load: SeamStatus(
            names[-1], "gone", "convert", State.INCOMPATIBLE, "it cannot be imported"
        ),
    )

    with pytest.raises(IncompatibleUpstreamError, match=r"correct the family's declaration"):
        required_seams.require_seams(seams.needed_by_model(PLUGINS))
    with pytest.raises(IncompatibleUpstreamError, match=r"install a release that is supported"):
        required_seams.require_seams(seams.needed_by_model(BUILT_IN[0]))


@pytest.mark.parametrize(
    ("family", "says"),
    [
        (BUILT_IN[0], "install a release that is supported"),
        (PLUGINS, r"correct the family's declaration in its plugin \(MoEFamily: converter"),
    ],
)
def test_other_layout_is_the_release_or_the_declaration(family: MoEFamily, says: str) -> None:
    with (
        pytest.raises(
            IncompatibleUpstreamError, match=rf"seam 'quantization': no scale\. .*{says}"
        ),
        required_seams.layout_errors(seams.QUANTIZATION, family),
    ):
        raise LayoutError("no scale")
