"""What of a plan stays in full precision, and why: for people who look before they start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.checkpoint.read.tensors import Weight
from nxdi_expertscale.checkpoint.write.plan import (
    LM_HEAD,
    Plan,
    PlannedTensor,
    Treatment,
    kept_by_source,
)
from nxdi_expertscale.families.exclusions import Exclusions

NOT_LINEAR = "no linear layer: norms, embeddings, biases"
ROUTER = "a router, which NxDI cannot load quantized"
BIASED = "a linear layer with a bias, which NxD has not quantized"
IN_BLOCK = "beside the experts of its layer, where NxD multiplies by the weight as it is"
MTP = "predicts further tokens, which NxDI does not load"
REQUESTED = "named by modules_to_not_convert"
BY_SOURCE = "in full precision in the quantized source"
TIED = "the embeddings serve as the output layer"
BY_FAMILY = "NxDI cannot load it quantized in this family"


@dataclass(frozen=True, slots=True)
class KeptTensors:
    """Tensors that stay in full precision for one reason.

    Attributes:
        reason: Why.
        tensors: How many there are.
        nbytes: Their bytes in the output.
        modules: The modules that they belong to, sorted.
    """

    reason: str
    tensors: int
    nbytes: int
    modules: tuple[str, ...]


def explain_kept(model: Model, plan: Plan, requested: Iterable[str]) -> tuple[KeptTensors, ...]:
    """Explain why tensors are not quantized.

    Args:
        model: The source.
        plan: What is done with it.
        requested: ``modules_to_not_convert``.

    Returns:
        The tensors by reason, those with the most bytes first.
    """
    reasons = _Reasons(model, tuple(requested))
    groups: dict[str, list[PlannedTensor]] = {}
    for planned in _kept(plan):
        groups.setdefault(reasons.find(planned.weight), []).append(planned)
    kept = (
        KeptTensors(
            reason,
            len(group),
            sum(new.nbytes for planned in group for new in planned.outputs),
            tuple(sorted({planned.weight.module for planned in group})),
        )
        for reason, group in groups.items()
    )
    return tuple(sorted(kept, key=lambda group: -group.nbytes))


def _kept(plan: Plan) -> Iterator[PlannedTensor]:
    for shard in plan.shards:
        for planned in shard.tensors:
            if planned.treatment is not Treatment.QUANTIZE:
                yield planned


class _Reasons:
    """Why a weight of a model is not quantized; the reasons in the order in which they decide."""

    def __init__(self, model: Model, requested: tuple[str, ...]) -> None:
        self._model = model
        family = model.family
        tied = (LM_HEAD,) if model.config.tie_word_embeddings else ()
        self._exclusions = [
            (reason, Exclusions(names, family))
            for reason, names in (
                (REQUESTED, requested),
                (BY_SOURCE, kept_by_source(model)),
                (TIED, tied),
                (BY_FAMILY, family.full_precision),
            )
            if names
        ]

    def find(self, weight: Weight) -> str:
        """The reason for one weight."""
        if weight.is_mtp:
            return MTP
        if not weight.is_linear:
            return NOT_LINEAR
        if not weight.can_be_quantized:
            return self._find_obstacle(weight)
        return next(
            reason for reason, exclusions in self._exclusions if exclusions.leave_out(weight.module)
        )

    def _find_obstacle(self, weight: Weight) -> str:
        if self._model.family.names.is_router_key(weight.name):
            return ROUTER
        if f"{weight.module}.bias" in self._model.files.tensors:
            return BIASED
        return IN_BLOCK
