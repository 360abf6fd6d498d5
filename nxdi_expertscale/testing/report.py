"""Formats what the check of a family found."""

from __future__ import annotations

import re
from collections.abc import Mapping

from nxdi_expertscale.errors import counted
from nxdi_expertscale.testing.check import FamilyCheck


def summary(found: FamilyCheck) -> str:
    """Each kind of parameter and of block with its worst error, the logits, the verdict last."""
    sections = {
        "parameters": found.parameters,
        "MoE blocks": found.moe,
        "other blocks": found.blocks,
        "logits": {
            "the model": found.logits,
            "only its experts quantized": found.logits_experts_alone,
            "against the dequantized weights": found.unexplained,
        },
    }
    lines = [f"family {found.family}: {counted(len(found.quantized), 'quantized parameter')}"]
    for title, errors in sections.items():
        lines += [title, *_worst_of_each_kind(errors)]
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"problem: {problem}" for problem in found.problems]
    return "\n".join([*lines, _verdict(found)])


def _worst_of_each_kind(errors: Mapping[str, float]) -> list[str]:
    """One line for names that differ by numbers alone, in the order in which they come."""
    worst: dict[str, float] = {}
    for name, error in errors.items():
        kind = re.sub(r"\d+", "*", name)
        worst[kind] = max(error, worst.get(kind, 0.0))
    return [f"  {error:9.4%}  {kind}" for kind, error in worst.items()]


def _verdict(found: FamilyCheck) -> str:
    if found.problems:
        return f"no: {counted(len(found.problems), 'problem')}"
    return "yes: the model is what one FP8 scale per channel and expert makes of it"
