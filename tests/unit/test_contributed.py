"""The names of contributed models, as their checkpoints have them and as they are declared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nxdi_expertscale.families.built_in import BUILT_IN
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.lookup import family_of
from nxdi_expertscale.patches import own_loader, seams

FAMILIES = {family.name: family for family in BUILT_IN}

EXPERTS = {
    "glm4_moe": "model.layers.3.mlp.experts.7.up_proj.weight",
    "deepseek_v3": "model.layers.3.mlp.experts.7.up_proj.weight",
    "minimax_m2": "model.layers.3.block_sparse_moe.experts.7.w3.weight",
    "olmoe": "model.layers.3.mlp.experts.7.up_proj.weight",
    "solar_open": "model.layers.3.mlp.experts.7.up_proj.weight",
    "minicpm_moe": "model.layers.3.mlp.experts.7.w3.weight",
    "sarvam_moe": "model.layers.3.mlp.experts.7.up_proj.weight",
    "mimo_v2": "model.layers.3.mlp.experts.7.up_proj.weight",
    "qwen3_next": "model.layers.3.mlp.experts.7.up_proj.weight",
    "qwen3_omni_moe": "thinker.model.layers.3.mlp.experts.7.up_proj.weight",
    "kimi_k2": "model.layers.3.mlp.experts.7.up_proj.weight",
}
"""A tensor of an expert in the published checkpoints, by the family's name."""


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_found_by_their_published_names(name: str) -> None:
    place = FAMILIES[name].names.parse_expert_key(EXPERTS[name])

    assert place is not None
    assert (place.layer, place.expert, place.projection) == (3, 7, FAMILIES[name].up)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("mine.modeling_qwen3_coder_moe", "qwen3_moe"),
        ("src.modeling_mixtral", "mixtral"),
        ("modeling_sarvam", "sarvam_moe"),
        ("modeling_mine", None),
    ],
)
def test_config_without_a_type_is_known_by_the_file_that_defines_it(
    module: str, expected: str | None
) -> None:
    family = family_of(None, BUILT_IN, {module, "neuronx_distributed_inference.models.config"})

    assert (None if family is None else family.name) == expected


def renamed(family: MoEFamily, *names: str) -> list[str]:
    return [family.renamed(name) for name in names]


def test_what_a_converter_leaves_is_renamed() -> None:
    bias = "layers.4.mlp.gate.e_score_correction_bias"

    assert renamed(FAMILIES["mimo_v2"], bias, "layers.4.mlp.gate.weight") == [
        "layers.4.mlp.router.e_score_correction_bias",
        "layers.4.mlp.gate.weight",
    ]


def test_talkers_experts_are_not_the_thinkers() -> None:
    names = FAMILIES["qwen3_omni_moe"].names

    assert names.parse_expert_key("talker.model.layers.3.mlp.experts.7.up_proj.weight") is None


class Application:
    def checkpoint_loader_fn(self, mmap: bool = False) -> str:
        return f"the quantized one, mmap={mmap}"


class NeuronKimiK2ForCausalLM(Application):
    def __init__(self, config: Any) -> None:
        self.config = config

    def checkpoint_loader_fn(self, mmap: bool = False) -> str:
        return "its own"


class Mine(NeuronKimiK2ForCausalLM):
    """A user's own application."""


@pytest.mark.parametrize("application", [NeuronKimiK2ForCausalLM, Mine])
@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({"expert_wise_scale": True}, "the quantized one, mmap=True"),
        ({"expert_wise_scale": False}, "its own"),
        ({"expert_wise_scale": True, "quantized": False}, "its own"),
        ({"expert_wise_scale": True, "quantized_checkpoints_path": None}, "its own"),
    ],
)
def test_own_loader_gives_way_to_nxdis_with_the_flag_on(
    application: Any, settings: dict[str, Any], reads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [patch] = own_loader.patches(BUILT_IN)
    assert (patch.seam, patch.attribute) == (
        seams.own_loader(FAMILIES["kimi_k2"]),
        f"{NeuronKimiK2ForCausalLM.__name__}.checkpoint_loader_fn",
    )
    found = {"quantized": True, "quantized_checkpoints_path": "fp8", **settings}
    asked = SimpleNamespace(
        is_on=found["expert_wise_scale"],
        is_quantized=found["quantized"],
        quantized_checkpoints_path=found["quantized_checkpoints_path"],
    )
    monkeypatch.setattr(own_loader, "checked_settings", lambda *_: asked)
    instance = application(SimpleNamespace())

    loaded = patch.wrapper(instance.checkpoint_loader_fn, instance, (), {"mmap": True})

    assert loaded == reads
    assert patch.seam in seams.needed_by_model(FAMILIES["kimi_k2"])
    assert patch.seam not in seams.needed_by_model(FAMILIES["deepseek_v3"])
