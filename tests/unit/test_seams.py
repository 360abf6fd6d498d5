"""The seams that a user of the feature cannot do without."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest

import nxdi_expertscale
from nxdi_expertscale.errors import IncompatibleUpstreamError
from nxdi_expertscale.families.built_in import BUILT_IN
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.engine import engine
from nxdi_expertscale.hooking.patch import SeamStatus, State
from nxdi_expertscale.loading.layout import LayoutError
from nxdi_expertscale.patches import required_seams, seams, state_dict


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
        lambda names, load, may_wait: SeamStatus(
            names[-1], "gone", "convert", State.INCOMPATIBLE, "it cannot be imported"
        ),
    )

    with pytest.raises(IncompatibleUpstreamError, match=r"correct the family's declaration"):
        required_seams.require_seams(seams.needed_by_model(PLUGINS))
    with pytest.raises(IncompatibleUpstreamError, match=r"install a release that is supported"):
        required_seams.require_seams(seams.needed_by_model(BUILT_IN[0]))


CONTRIBUTED = MoEFamily(name="contributed", model_types=("x",), converter="*.modeling_x:convert")


def test_converter_that_is_in_whatever_package_has_to_be_there_when_the_model_is_built(
    write_module: Callable[..., None],
) -> None:
    nxdi_expertscale.activate()
    engine.activate(state_dict.patches([CONTRIBUTED]))
    name = seams.state_dict(CONTRIBUTED)

    required_seams.require_seams([name], load=True)
    with pytest.raises(
        IncompatibleUpstreamError,
        match=r"seam 'state_dict:contributed' \(\*\.modeling_x\.convert\): no module modeling_x "
        r"that defines convert has been imported\. Import the contributed model",
    ):
        required_seams.require_seams([name], load=True, may_wait=False)

    write_module(
        mine__modeling_x="""
            def convert(state_dict, config): return state_dict

            class Model:
                @staticmethod
                def convert_hf_to_neuron_state_dict(state_dict, config):
                    return convert(state_dict, config)
        """
    )
    importlib.import_module("mine.modeling_x")
    required_seams.require_seams([name], load=True, may_wait=False)


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
