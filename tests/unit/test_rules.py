"""Each rule: settings that it is about, with what it says, and settings that are fine."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from nxdi_expertscale import ConfigurationError
from nxdi_expertscale.settings import rules
from nxdi_expertscale.settings.rules import RULES, Rule, Severity
from nxdi_expertscale.settings.settings import Settings, Upstream
from tests.unit import configs

KERNELS = frozenset({1, 2})
DEVICE = Upstream(reads_moe_settings=True, kernel_cores=KERNELS)
BEFORE_SETTINGS = Upstream(reads_moe_settings=False, kernel_cores=KERNELS)
OFF: dict[str, Any] = {"expert_wise_scale": False}
KERNEL = SimpleNamespace(logical_nc_config=2, use_torch_block_wise=False)
ONE_CORE = SimpleNamespace(logical_nc_config=1, use_torch_block_wise=False)
WITHOUT_KERNEL = SimpleNamespace(logical_nc_config=1, use_torch_block_wise=True)


class Case(NamedTuple):
    """Settings, and what is said of them."""

    settings: Settings
    says: str = ""


def case(says: str = "", *args: Any, **kwargs: Any) -> Case:
    return Case(configs.settings(*args, **kwargs), says)


APPLIES: dict[str, list[Case]] = {
    "flag_type": [
        case(f"must be true or false, not {value!r}; write", {"expert_wise_scale": value}, **where)
        for value in ("true", "false", 1, 0, None, "", [])
        for where in ({}, {"alone": True}, {"model": {"model_type": "qwen3"}})
    ],
    "flag_place": [
        case(
            "set on the model's config (qwen3_moe), where it has no effect; give it to the neuron "
            "config: MoENeuronConfig(expert_wise_scale=True)",
            neuron,
            {"expert_wise_scale": value},
        )
        for neuron in ({}, OFF)
        for value in (True, False, "true")
    ],
    "neuron_config_class": [
        case(
            "needs a MoENeuronConfig for this model's experts, and finds a NeuronConfig; write",
            {"quantized": quantized},
            cls=configs.NeuronConfig,
        )
        for quantized in (True, False)
    ],
    "unsupported_model": [
        case("not supported for 'dbrx': NxDI's converter", model={"model_type": "dbrx"}),
        case("in no other form; run the original", model={"model_type": "gpt_oss"}),
        case(
            "drops every scale (contrib/models/Trinity/src/modeling_trinity.py: gate_w = ",
            model={"model_type": "afmoe"},
        ),
    ],
    "unknown_model": [
        case(
            "not supported for 'mine_moe': it has experts, and no plugin declares its family; turn "
            "expert_wise_scale off. A model with experts",
            model={"model_type": "mine_moe", **counts},
        )
        for counts in (
            {"num_experts": 64},
            {"num_experts": None, "n_routed_experts": 8},
            {"num_experts": None, "num_local_experts": 2},
        )
    ],
    "quantization_type": [
        case(
            f"needs quantization_type='per_channel_symmetric', not {found!r}; set it to",
            {"quantization_type": found},
            alone=alone,
        )
        for found in (
            "per_tensor_symmetric",
            "expert_wise_per_channel_symmetric",
            "blockwise_symmetric",
        )
        for alone in (True, False)
    ],
    "quantized_checkpoint": [
        case("set quantized=True and", {"quantized": False, **setting})
        for setting in (
            {"quantized_mlp_kernel_enabled": True},
            {"activation_quantization_type": "dynamic"},
        )
    ],
    "exclusions_type": [
        case(
            "modules_to_not_convert is 'lm_head', and each letter of a text would be taken for a "
            "name; write a list: modules_to_not_convert=['lm_head']",
            {"modules_to_not_convert": "lm_head", **flag},
        )
        for flag in ({}, OFF)
    ],
    "exclusions_empty": [
        case(
            "has an empty name, which is a part of every module's; remove it",
            {"modules_to_not_convert": ["lm_head", name], **flag},
        )
        for name in ("", " ", "model.")
        for flag in ({}, OFF)
    ],
    "exclusion_of_an_expert": [
        case(
            "modules_to_not_convert: 'down_proj' names a part of what NxDI fuses, and it fuses a "
            "layer's experts in one dtype; name all experts of the layer: 'layers.0.mlp.experts'",
            {"modules_to_not_convert": ["down_proj"], **flag},
        )
        for flag in ({}, OFF)
    ],
    "exclusion_of_a_projection": [
        case(
            "modules_to_not_convert keeps layers.1.self_attn.q_proj in full precision, and with "
            "fused_qkv=True NxDI fuses it with others in one dtype; name all of "
            "layers.1.self_attn.q_proj, layers.1.self_attn.k_proj, layers.1.self_attn.v_proj, or "
            "set fused_qkv=False",
            {"modules_to_not_convert": ["layers.1.self_attn.q_proj"], "fused_qkv": True},
        )
    ],
    "upstream_limit": [
        case(
            "'qwen3_moe': NxDI ignores norm_topk_prob=false and normalizes a token's routing "
            "weights, so that it answers wrongly; this is a limit of NxDI itself",
            model={"norm_topk_prob": False},
        ),
        case(
            "from 4096 tokens on; this is a limit of NxDI itself (0.5 to 0.9), without FP8 as "
            "well; use a seq_len of at most 4095",
            model={"use_sliding_window": True, "sliding_window": 4095},
        ),
    ],
    "key_value_heads": [
        case(
            f"tp_degree={degree} for {heads} heads with {pairs} heads of keys and values: NxDI "
            "cannot spread these over so many ranks, without FP8 as well; use a tp_degree that "
            f"divides {pairs}, or a multiple of {pairs}",
            {"tp_degree": degree},
            {"num_attention_heads": heads, "num_key_value_heads": pairs},
        )
        for degree, heads, pairs in ((3, 4, 2), (3, 12, 4), (6, 32, 4), (2, 12, 3))
    ],
    "cast_weights": [
        case(
            "casts such weights to torch.bfloat16 when it reads a checkpoint, and not back; use",
            {"quantization_dtype": "f8e5m2", "torch_dtype": "torch.bfloat16", **flag},
        )
        for flag in ({}, OFF)
    ],
    "ep_degree": [
        case(f"ep_degree={degree}: no release", {"ep_degree": degree, "batch_size": 128})
        for degree in (0, 2, 16)
    ],
    "expert_parallel_call": [
        case(
            f"(degree 2): token generation with {batch} x 1 tokens and 8 of 128 experts per token "
            f"chooses {8 * batch} experts, and NxD needs at least 128 for it; use a batch_size of "
            "at least 16, or moe_ep_degree=1",
            {"moe_ep_degree": 2, "batch_size": batch},
        )
        for batch in (1, 15)
    ],
    "logical_nc": [
        case(
            "needs blockwise_matmul_config.logical_nc_config=2, not 1: the blockwise kernel",
            {"blockwise_matmul_config": ONE_CORE},
            upstream=DEVICE,
        ),
        case(
            'is set), or set blockwise_matmul_config={"use_torch_block_wise": True}',
            {"logical_nc_config": 1, "blockwise_matmul_config": KERNEL},
            upstream=DEVICE,
        ),
        case(
            "needs logical_nc_config=2, not 1",
            {"logical_nc_config": 1, "capacity_factor": 1.0},
            upstream=DEVICE,
        ),
    ],
    "logical_nc_without_settings": [
        case(
            "and this release has no way round it; set it to 2",
            {"logical_nc_config": 1},
            upstream=BEFORE_SETTINGS,
        ),
    ],
    "shared_scale_on_ranks": [
        case("(degree 2): a scale that the experts share", {**OFF, "moe_ep_degree": 2}),
    ],
    "shared_scale_in_kernel": [
        case("here the experts share one; set", OFF, {"moe_fused_nki_kernel_enabled": True}),
    ],
    "without_effect": [
        case("not quantized (quantized=False); set", {"quantized": False}, alone=True),
    ],
    "short_context": [
        case(
            "contexts of 1 x 63 tokens are shorter than a block (block_size 512), and NxD cannot "
            "run them over all experts; use contexts of at least 64 tokens, or a smaller",
            {"moe_ep_degree": 2, "batch_size": 16, "ctx_batch_size": 1, "max_context_length": 63},
        ),
    ],
    "inexact_upstream": [
        case(
            "its answers differ slightly from 8192 tokens on",
            {"seq_len": 8192},
            {"model_type": "llama4_text", "num_local_experts": 16, "num_experts_per_tok": 1},
        ),
    ],
}
"""For each rule, settings that it is about."""

FINE: dict[str, list[Case]] = {
    "flag_type": [case(), case("", OFF), case("", alone=True)],
    "flag_place": [case(), case("", OFF)],
    "neuron_config_class": [
        case(),
        case("", OFF, cls=configs.NeuronConfig),
        case("", model={"model_type": "qwen3"}, cls=configs.NeuronConfig),
    ],
    "unsupported_model": [
        case("", OFF, {"model_type": "dbrx"}),
        case("", {"quantized": False}, {"model_type": "dbrx"}),
        case("", model={"model_type": "qwen3"}),
    ],
    "unknown_model": [
        case("", OFF, {"model_type": "mine_moe", "num_experts": 64}),
        case("", {"quantized": False}, {"model_type": "mine_moe", "num_experts": 64}),
        case("", model={"model_type": "qwen3", "num_experts": None}),
        case("", model={"model_type": "qwen3", "num_experts": None, "num_local_experts": 1}),
    ],
    "quantization_type": [
        case(),
        case("", {**OFF, "quantization_type": "per_tensor_symmetric"}),
        case("", {"quantized": False, "quantization_type": "per_tensor_symmetric"}),
    ],
    "quantized_checkpoint": [
        case("", {"quantized_mlp_kernel_enabled": True}),
        case("", {"quantized": False}),
        # A dense model may be quantized beforehand, with a kernel of its own.
        case(
            "",
            {"quantized": False, "quantized_mlp_kernel_enabled": True},
            {"model_type": "qwen3"},
        ),
    ],
    "exclusions_type": [
        case("", {"modules_to_not_convert": ["lm_head"]}),
        case("", {"modules_to_not_convert": None}),
        case("", {**OFF, "modules_to_not_convert": "lm_head"}, {"model_type": "qwen3"}),
    ],
    "exclusions_empty": [
        case("", {"modules_to_not_convert": ["lm_head"]}),
        case("", {"modules_to_not_convert": [""]}, {"model_type": "qwen3"}),
    ],
    "exclusion_of_an_expert": [
        case("", {"modules_to_not_convert": ["gate_proj", "up_proj", "down_proj"]}),
        case("", {"modules_to_not_convert": ["down_proj"]}, {"model_type": "qwen3"}),
    ],
    "exclusion_of_a_projection": [
        case("", {"modules_to_not_convert": ["layers.1.self_attn.q_proj"]}),
        case("", {"modules_to_not_convert": ["qkv_proj"], "fused_qkv": True}),
    ],
    "upstream_limit": [
        case(),
        case("", OFF, {"norm_topk_prob": False}),
        case("", {"quantized": False}, {"norm_topk_prob": False}),
        case("", model={"use_sliding_window": True, "sliding_window": 4096}),
        # The config of a model that also sees, around that of its language model.
        case("", model={"num_hidden_layers": None, "norm_topk_prob": False}),
    ],
    "key_value_heads": [
        *(
            case(
                "",
                {"tp_degree": degree, **others},
                {"num_attention_heads": heads, "num_key_value_heads": pairs},
            )
            for degree, heads, pairs, others in (
                (2, 4, 2, {}),
                (8, 32, 4, {}),
                (2, 32, 4, {}),
                # As many heads of keys as of queries, and one for all, are padded and repeated.
                (3, 4, 4, {}),
                (2, 3, 1, {}),
                (3, 4, 2, {"expert_wise_scale": False}),
                (6, 12, 4, {"cp_degree": 2}),
                (None, 12, 4, {}),
            )
        ),
        case("", {"tp_degree": 3}, {"num_attention_heads": 4, "num_key_value_heads": None}),
        case(
            "",
            {"tp_degree": 3},
            {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2},
        ),
    ],
    "cast_weights": [
        case("", {"quantization_dtype": "f8e5m2", "torch_dtype": "torch.float32"}),
        case(
            "",
            {
                "quantization_dtype": "f8e5m2",
                "torch_dtype": "torch.bfloat16",
                "cast_type": "as-declared",
            },
        ),
        case(
            "",
            {"quantization_dtype": "f8e5m2", "torch_dtype": "torch.bfloat16"},
            {"model_type": "qwen3"},
        ),
    ],
    "ep_degree": [case("", {"ep_degree": 1}), case("", {"ep_degree": None})],
    "expert_parallel_call": [
        case("", {"moe_ep_degree": 2, "batch_size": 16}),
        case("", {"moe_ep_degree": 1, "batch_size": 1}),
        # The sizes are not known yet.
        case("", {"moe_ep_degree": 2, "batch_size": 1}, {"num_experts": None}),
    ],
    "logical_nc": [
        case("", upstream=DEVICE),
        case("", {"logical_nc_config": 2, "blockwise_matmul_config": KERNEL}, upstream=DEVICE),
        case("", {"logical_nc_config": 1, "glu_mlp": False}, upstream=DEVICE),
        case(
            "",
            {"logical_nc_config": 1, "blockwise_matmul_config": WITHOUT_KERNEL},
            upstream=DEVICE,
        ),
        case("", {"logical_nc_config": 1}, upstream=BEFORE_SETTINGS),
        # On a CPU, and where no kernel is there for one core.
        case("", {"logical_nc_config": 1}),
        case("", {"logical_nc_config": 1}, upstream=Upstream(True, frozenset({2}))),
    ],
    "logical_nc_without_settings": [
        case("", {"logical_nc_config": 1, "capacity_factor": 1.0}, upstream=BEFORE_SETTINGS),
        case("", {"logical_nc_config": 1, "glu_mlp": False}, upstream=BEFORE_SETTINGS),
        case("", {"logical_nc_config": 2}, upstream=BEFORE_SETTINGS),
        case("", {"logical_nc_config": 1}, upstream=Upstream(False, frozenset({2}))),
        case("", {"logical_nc_config": 1}, upstream=DEVICE),
    ],
    "shared_scale_on_ranks": [
        case("", {"moe_ep_degree": 2}),
        case("", {**OFF, "moe_ep_degree": 2, "quantized": False}),
        case("", {**OFF, "moe_ep_degree": 2}, upstream=BEFORE_SETTINGS),
        case(
            "",
            {
                **OFF,
                "moe_ep_degree": 2,
                "quantization_type": "expert_wise_per_channel_symmetric",
            },
        ),
        case("", {**OFF, "moe_ep_degree": 2, "modules_to_not_convert": ["mlp.experts"]}),
    ],
    "shared_scale_in_kernel": [
        case("", {}, {"moe_fused_nki_kernel_enabled": True}),
        case(
            "",
            {**OFF, "modules_to_not_convert": ["mlp.experts"]},
            {"moe_fused_nki_kernel_enabled": True},
        ),
    ],
    "without_effect": [case("", alone=True), case("", {**OFF, "quantized": False}, alone=True)],
    "short_context": [
        case("", {"moe_ep_degree": 2, "ctx_batch_size": 1, "max_context_length": 64}),
        case("", {"moe_ep_degree": 1, "ctx_batch_size": 1, "max_context_length": 63}),
    ],
    "inexact_upstream": [
        case(
            "",
            {"seq_len": 8191},
            {"model_type": "llama4_text", "num_local_experts": 16, "num_experts_per_tok": 1},
        ),
    ],
}
"""For each rule, settings that it has nothing to say of."""


def named(rule: Rule) -> str:
    return rule.name


def test_names_are_unique_and_no_case_is_of_a_rule_that_is_gone() -> None:
    names = [rule.name for rule in RULES]

    assert len(set(names)) == len(names)
    assert APPLIES.keys() <= set(names)
    assert FINE.keys() <= set(names)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_rule_applies_with_what_is_wrong_and_what_to_write(rule: Rule) -> None:
    assert APPLIES.get(rule.name), "a rule needs settings that it applies to"
    for settings, says in APPLIES[rule.name]:
        message = rule.message(settings)
        assert message is not None
        assert says in message
        assert "{" not in message.replace('{"use_torch_block_wise": True}', "")


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_rule_leaves_alone_what_is_fine(rule: Rule) -> None:
    assert FINE.get(rule.name), "a rule needs settings that it does not apply to"
    for settings, _ in FINE[rule.name]:
        assert rule.message(settings) is None


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_error_is_raised_and_a_warning_given(rule: Rule, caplog: pytest.LogCaptureFixture) -> None:
    settings, says = APPLIES[rule.name][0]
    with caplog.at_level(logging.WARNING):
        rules.warn(settings)
    if rule.severity is Severity.ERROR:
        with pytest.raises(ConfigurationError) as raised:
            rules.check(settings)
        assert says in str(raised.value)
        assert says not in caplog.text
    else:
        rules.check(settings)
        assert says in caplog.text


def test_usual_settings_are_neither_refused_nor_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for settings in (configs.settings(), configs.settings(OFF), configs.settings(alone=True)):
            rules.check(settings)
            rules.warn(settings)

    assert caplog.text == ""


def test_what_the_neuron_config_alone_shows_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    unquantized = {"quantized": False}
    with caplog.at_level(logging.WARNING):
        rules.warn(configs.settings(unquantized, alone=True))
        rules.warn(configs.settings(unquantized))

    assert len(caplog.messages) == 1
