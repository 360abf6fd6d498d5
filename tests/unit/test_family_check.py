"""What the check of a family calls a problem, and how it is printed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nxdi_expertscale.testing.check import FamilyCheck, problems_of
from nxdi_expertscale.testing.report import summary

EXPERTS = "layers.0.mlp.expert_mlps.mlp_op.down_proj.weight"
RIGHT = FamilyCheck(
    family="mine",
    quantized=(EXPERTS,),
    parameters={EXPERTS: 0.027, "norm.weight": 0.0},
    moe={"layers.0.mlp": 0.04},
    blocks={"layers.0.self_attn": 0.0},
    logits=0.1,
    logits_experts_alone=0.05,
    unexplained=1e-6,
    problems=(),
    notes=(),
)


def test_fp8s_own_rounding_is_no_problem() -> None:
    assert list(problems_of(RIGHT)) == []
    assert RIGHT.is_right


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantized": ()}, "no expert is quantized"),
        ({"quantized": ("lm_head.weight",)}, "no expert is quantized"),
        ({"parameters": {EXPERTS: 0.07}}, f"{EXPERTS}: the parameter is 7.0% off"),
        ({"parameters": {"norm.weight": float("nan")}}, "norm.weight: the parameter is nan% off"),
        ({"moe": {"layers.0.mlp": 0.97}}, "layers.0.mlp: its output is 97.0% off"),
        ({"blocks": {"layers.0.self_attn": 9.0}}, "layers.0.self_attn: its output is 900.0% off"),
        ({"unexplained": 0.02}, "the logits are 2.0% off those of the dequantized weights"),
    ],
)
def test_what_fp8_does_not_explain_is_one(change: dict[str, Any], says: str) -> None:
    [problem] = problems_of(dataclasses.replace(RIGHT, **change))

    assert problem.startswith(says)


def test_summary_has_the_worst_of_each_kind_and_the_answer_last() -> None:
    wrong = dataclasses.replace(
        RIGHT,
        parameters={"layers.0.norm.weight": 0.01, "layers.11.norm.weight": 0.03},
        problems=("something",),
        notes=("by the way",),
    )

    lines = summary(wrong).splitlines()
    assert lines[0] == "family mine: 1 quantized parameter"
    assert "    3.0000%  layers.*.norm.weight" in lines
    assert lines[-3:] == ["note: by the way", "problem: something", "no: 1 problem"]
    assert summary(RIGHT).splitlines()[-1].startswith("yes: ")
