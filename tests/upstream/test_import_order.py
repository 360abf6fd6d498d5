"""This package imported before NxDI, and after it: each in a process of its own.

This module imports nothing of the package itself: the processes import the module.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import processes
from tests.harness.targets import Target

WITHIN_FP8 = 0.06
MODELING = "neuronx_distributed_inference.models.qwen3_moe.modeling_qwen3_moe"


def start_without_the_package(_folder: Path) -> None:
    assert "nxdi_expertscale" not in sys.modules


def errors_when_imported(
    before: bool, store: Path, checkpoint: Path, settings: dict[str, Any]
) -> Any:
    """The model's errors where this package is imported before NxDI, or after it."""
    importlib.import_module("nxdi_expertscale" if before else MODELING)
    importlib.import_module(MODELING if before else "nxdi_expertscale")
    from nxdi_expertscale.testing import ranks
    from tests.harness import running

    with ranks.parallel_state(0, 1, store):
        return running.compare(checkpoint, running.load(checkpoint, **settings))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_import_before_nxdi_or_after_it(
    nxdi: Any, target: Target, moe: Path, tmp_path: Path, before: bool
) -> None:
    settings = {**nxdi.quantize(moe, tmp_path / "fp8"), "expert_wise_scale": True}

    found = processes.run_alone(
        target,
        start_without_the_package,
        tmp_path,
        errors_when_imported,
        before,
        tmp_path / "store",
        moe,
        settings,
    )

    assert found.beyond(WITHIN_FP8) == {}


CONTRIBUTED = """
from neuronx_distributed_inference.models.qwen3_moe.modeling_qwen3_moe import (
    NeuronQwen3MoeForCausalLM,
    convert_qwen3_moe_hf_to_neuron_state_dict,
)

class NeuronContributedForCausalLM(NeuronQwen3MoeForCausalLM):
    @staticmethod
    def convert_hf_to_neuron_state_dict({parameters}):
        return {converter}(state_dict, config)
"""
"""A model of a user's own that imports NxDI's converter by name, as Qwen3-Coder's does."""

BY_NAME = CONTRIBUTED.format(
    parameters="state_dict, config", converter="convert_qwen3_moe_hf_to_neuron_state_dict"
)
AS_DEFAULT = CONTRIBUTED.format(
    parameters="state_dict, config, convert=convert_qwen3_moe_hf_to_neuron_state_dict",
    converter="convert",
)


def errors_of_contribution(folder: Path, checkpoint: Path, settings: dict[str, Any]) -> Any:
    """Errors of a model whose module is imported before this package, or why it is refused."""
    sys.path.insert(0, str(folder))
    contribution = importlib.import_module("contribution")
    import nxdi_expertscale
    from nxdi_expertscale.testing import ranks
    from tests.harness import running

    with ranks.parallel_state(0, 1, folder / "store"):
        try:
            config = running.inference_config(checkpoint, **settings)
            application = contribution.NeuronContributedForCausalLM(str(checkpoint), config)
            return running.compare(checkpoint, running.load_application(application))
        except nxdi_expertscale.IncompatibleUpstreamError as error:
            return str(error)


@pytest.mark.parametrize("source", [BY_NAME, AS_DEFAULT], ids=["by name", "as default"])
def test_contributed_model_that_is_imported_before_this_package(
    nxdi: Any, target: Target, moe: Path, tmp_path: Path, source: str
) -> None:
    settings = {**nxdi.quantize(moe, tmp_path / "fp8"), "expert_wise_scale": True}
    (tmp_path / "contribution.py").write_text(source)

    outcome = processes.run_alone(
        target,
        start_without_the_package,
        tmp_path,
        errors_of_contribution,
        tmp_path,
        moe,
        settings,
    )

    if source == BY_NAME:
        assert outcome.beyond(WITHIN_FP8) == {}
    else:
        assert isinstance(outcome, str)
        assert "seam 'state_dict:qwen3_moe'" in outcome
        assert (
            "contribution.NeuronContributedForCausalLM.convert_hf_to_neuron_state_dict" in outcome
        )
        assert "Import nxdi_expertscale before anything that imports NxDI" in outcome
