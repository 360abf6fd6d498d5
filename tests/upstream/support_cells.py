"""The cells of the README's support table, each from a run on the real sources of a release.

These runs take long, so they are no part of the default tests: ``tox -e support-table`` checks the
README against them, and :mod:`tests.upstream.support_table` writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale import quantize_checkpoint
from nxdi_expertscale.errors import ExpertScaleError
from tests.harness import expert_groups, models, processes
from tests.harness.targets import Target
from tests.harness.whole_model import Comparison
from tests.upstream import support_table
from tests.upstream.support_table import Cell, Row
from tests.upstream.test_kernels import (
    FUSED_KERNELS,
    FUSED_WIDTH,
    CalledError,
    Kernel,
    hugging_face_scales,
)

pytestmark = pytest.mark.usefixtures("active")

RANKS = 2
SAVE: dict[str, Callable[..., Path]] = {
    "Qwen3 MoE": models.save_qwen3_moe,
    "Mixtral": models.save_mixtral,
    "Llama 4": models.save_llama4,
}
CUT = expert_groups.Degrees(tensor=RANKS, expert=1)
SPREAD = expert_groups.Degrees(tensor=1, expert=RANKS)
HYBRID = {
    "moe_cte_tp_degree": CUT.tensor,
    "moe_cte_ep_degree": CUT.expert,
    "moe_tkg_tp_degree": SPREAD.tensor,
    "moe_tkg_ep_degree": SPREAD.expert,
}
# Contexts are no whole number of blocks: NxD 0.15 would divide them with a kernel of the device.
BLOCKS = {"block_size": 5, "use_torch_block_wise": True}


@pytest.fixture(scope="session", params=SAVE)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts differ in magnitude by a factor of 16."""
    return SAVE[family](tmp_path_factory.mktemp("models") / "model", spread=16.0)


@pytest.fixture(scope="session")
def fp8(nxdi: Any, checkpoint: Path) -> dict[str, Any]:
    folder = checkpoint.parent / "fp8"
    quantize_checkpoint(checkpoint, folder)
    return {**nxdi.FP8, "quantized_checkpoints_path": str(folder)}


def experts_read_settings(nxdi: Any, checkpoint: Path) -> bool:
    """Whether NxDI builds the experts from the settings of the neuron config for them."""
    modeling = sys.modules[nxdi.application_cls(checkpoint).__module__]
    return "hybrid_sharding_config" in vars(nxdi.MoENeuronConfig()) and (
        modeling.initialize_moe_module.__module__.endswith(".moe_v2")
    )


def runs(errors: list[float]) -> Cell:
    return Cell("runs", error=max(errors))


NOT_IN_RELEASE = Cell("not in this release")


def expert_wise(nxdi: Any, checkpoint: Path, fp8: dict[str, Any], **settings: Any) -> Cell:
    loaded = nxdi.load(checkpoint, **{**fp8, "expert_wise_scale": True, **settings})
    return runs(nxdi.moe_errors(checkpoint, loaded))


def whole_model(
    nxdi: Any, checkpoint: Path, fp8: dict[str, Any], *, expert_wise: bool
) -> Comparison:
    loaded = nxdi.load(checkpoint, **fp8, expert_wise_scale=expert_wise)
    found: Comparison = nxdi.compare(checkpoint, loaded)
    return found


def in_dtype(nxdi: Any, checkpoint: Path, name: str) -> Cell:
    settings = nxdi.quantize(
        checkpoint,
        checkpoint.parent / name,
        not_converted=["mlp.gate", "block_sparse_moe.gate"],
        quantization_dtype=name,
    )
    return expert_wise(nxdi, checkpoint, settings)


def errors_on_rank(
    rank: int,
    checkpoint: Path,
    settings: dict[str, Any],
    context: expert_groups.Degrees | None,
    generation: expert_groups.Degrees | None,
) -> list[float]:
    import nxdi_expertscale
    from tests.harness import running

    nxdi_expertscale.activate()
    if context is not None and generation is not None:
        expert_groups.make(context=context, generation=generation)
    loaded = running.load(checkpoint, rank=rank, tp_degree=RANKS, **settings)
    return running.moe_errors(checkpoint, loaded)


def on_ranks(
    nxdi: Any,
    target: Target,
    checkpoint: Path,
    settings: dict[str, Any],
    store: Path,
    context: expert_groups.Degrees | None = None,
    generation: expert_groups.Degrees | None = None,
) -> Cell:
    asked = {"expert_wise_scale": True, **settings}
    # What is refused is refused here, before any other process starts.
    nxdi.inference_config(checkpoint, **asked)
    results = processes.run_on_ranks(
        target, RANKS, store, errors_on_rank, checkpoint, asked, context, generation
    )
    return runs([error for errors in results for error in errors])


def beside_a_draft(nxdi: Any, checkpoint: Path, fp8: dict[str, Any]) -> Cell:
    from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig

    application = nxdi.application_cls(checkpoint)
    before = application._FUSED_PREFIX, application._model_cls
    config, draft = nxdi.configs_of_a_pair(checkpoint, **fp8, expert_wise_scale=True)
    config.fused_spec_config = FusedSpecNeuronConfig(
        application._model_cls,
        draft_config=draft,
        draft_model_path=fp8["quantized_checkpoints_path"],
    )
    try:
        module = nxdi.load_application(application(str(checkpoint), config)).module
    finally:
        application._FUSED_PREFIX, application._model_cls = before
    return runs(
        [
            error
            for model in (module.draft_model, module.target_model)
            for error in nxdi.moe_errors(checkpoint, nxdi.part(model))
        ]
    )


def fused_generation(nxdi: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Cell:
    """Through a kernel in the kernel's place: whether it gets each expert's scale."""
    from neuronx_distributed.modules.moe import moe_fused_tkg

    monkeypatch.setattr(models, "MOE_INTERMEDIATE_SIZE", FUSED_WIDTH)
    wide = models.save_qwen3_moe(folder / "wide", spread=16.0)
    kernel = Kernel()
    for name in FUSED_KERNELS:
        if hasattr(moe_fused_tkg, name):
            monkeypatch.setattr(moe_fused_tkg, name, kernel)
    quantize_checkpoint(wide, folder / "fp8")
    settings = {**nxdi.FP8, "quantized_checkpoints_path": str(folder / "fp8")}
    loaded = nxdi.load(wide, **settings, expert_wise_scale=True, moe_fused_nki_kernel_enabled=True)
    with pytest.raises(CalledError), torch.no_grad():
        loaded.module.layers[0].mlp(torch.randn(1, 1, models.HIDDEN_SIZE))
    gate_up, down = hugging_face_scales(wide)
    return runs(
        [
            nxdi.relative_error(kernel.keywords["expert_gate_up_weights_scale"], gate_up),
            nxdi.relative_error(kernel.keywords["expert_down_weights_scale"], down),
        ]
    )


@pytest.mark.parametrize("mode", support_table.MODES)
def test_cell(
    nxdi: Any,
    target: Target,
    family: str,
    mode: str,
    checkpoint: Path,
    fp8: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    row = Row(family, mode)
    if target.is_double or not support_table.is_to_run(row):
        pytest.skip("no cell")

    try:
        cell = measure(nxdi, target, row, checkpoint, fp8, tmp_path, monkeypatch)
    except ExpertScaleError as error:
        cell = Cell("refused", message=str(error))

    record_property(support_table.PROPERTY, support_table.to_property(target.name, row, cell))
    if not support_table.being_written():
        assert cell.says_the_same_as(support_table.in_readme()[target.name, row])


def measure(
    nxdi: Any,
    target: Target,
    row: Row,
    checkpoint: Path,
    fp8: dict[str, Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Cell:
    """Run a mode of a family on a release."""
    reads_settings = experts_read_settings(nxdi, checkpoint)
    spread = {"batch_size": models.EXPERTS, "ctx_batch_size": 1, "blockwise_matmul_config": BLOCKS}
    store = folder / "store"
    cell = NOT_IN_RELEASE
    match row.mode:
        case "one rank":
            cell = expert_wise(nxdi, checkpoint, fp8)
        case "one rank, flag off":
            cell = expert_wise(nxdi, checkpoint, fp8, expert_wise_scale=False)
        case "logits" | "logits, flag off":
            found = whole_model(nxdi, checkpoint, fp8, expert_wise=row.mode == "logits")
            cell = runs([found.logits])
        case "parameters":
            found = whole_model(nxdi, checkpoint, fp8, expert_wise=True)
            cell = runs([*found.parameters.values()])
        case "tensor parallel":
            cell = on_ranks(nxdi, target, checkpoint, {**fp8, "moe_tp_degree": RANKS}, store)
        case "expert parallel" if reads_settings:
            asked = {**fp8, **spread, "moe_ep_degree": RANKS}
            cell = on_ranks(nxdi, target, checkpoint, asked, store, SPREAD, SPREAD)
        case "expert parallel, flag off" if reads_settings:
            asked = {**fp8, **spread, "moe_ep_degree": RANKS, "expert_wise_scale": False}
            cell = on_ranks(nxdi, target, checkpoint, asked, store, SPREAD, SPREAD)
        case "hybrid sharding" if reads_settings:
            asked = {**fp8, **spread, "moe_tp_degree": RANKS, "hybrid_sharding_config": HYBRID}
            cell = on_ranks(nxdi, target, checkpoint, asked, store, CUT, SPREAD)
        case "fused token generation" if reads_settings:
            cell = fused_generation(nxdi, folder, monkeypatch)
        case "beside a draft":
            cell = beside_a_draft(nxdi, checkpoint, fp8)
        case "int8" | "f8e5m2":
            cell = in_dtype(nxdi, checkpoint, row.mode)
    return cell
