"""Expert parallelism's limits, from settings alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.settings import expert_parallel

EXPERTS, TOP_K = 128, 8
"""Qwen3-30B-A3B's."""


def settings(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "moe_ep_degree": 4,
            "batch_size": 16,
            "ctx_batch_size": 1,
            "tkg_batch_size": 16,
            "max_context_length": 4096,
            **changes,
        }
    )


def test_without_the_settings_there_is_one_rank() -> None:
    assert expert_parallel.degrees(SimpleNamespace()) == (1, 1)
    expert_parallel.check(SimpleNamespace(batch_size=1), EXPERTS, TOP_K)


def test_hybrid_sharding_has_degrees_of_its_own() -> None:
    hybrid = SimpleNamespace(moe_cte_ep_degree=2, moe_tkg_ep_degree=8)

    assert expert_parallel.degrees(settings(hybrid_sharding_config=hybrid)) == (2, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_context_length": 64},
        {"tkg_batch_size": 1, "moe_ep_degree": 1},
        {"tkg_batch_size": 16, "speculation_length": 4},
        {"enable_bucketing": True},
        {"enable_bucketing": True, "context_encoding_buckets": [64, 4096]},
        {"enable_bucketing": True, "context_encoding_buckets": [[64, 0], [4096, 512]]},
        {"token_generation_batches": [16, 32]},
        {"tkg_batch_size": 1, "spec_batch_size": 16, "speculation_length": 4},
    ],
)
def test_enough_tokens_are_taken(changes: dict[str, Any]) -> None:
    expert_parallel.check(settings(**changes), EXPERTS, TOP_K)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tkg_batch_size": 15}, "token generation with 15 x 1 .* batch_size of at least 16"),
        ({"token_generation_batches": [4, 16]}, "token generation with 4 x 1"),
        (
            {"chunked_prefill_config": SimpleNamespace(max_num_seqs=8)},
            "token generation with 8 x 1",
        ),
        ({"max_context_length": 15}, "context encoding with 1 x 15 .* at least 16 tokens"),
        (
            {"enable_bucketing": True, "context_encoding_buckets": [8, 4096]},
            "context encoding with 1 x 8",
        ),
        (
            {"tkg_batch_size": 15, "speculation_length": 4, "enable_fused_speculation": True},
            "speculation with 15 x 4 .* batch_size of at least 16",
        ),
        ({"medusa_speculation_length": 2}, "speculation with 16 x 2 .* at least 32"),
    ],
)
def test_too_few_tokens_are_refused_with_what_is_enough(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        expert_parallel.check(settings(**changes), EXPERTS, TOP_K)


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"max_context_length": 63}, True),
        ({"max_context_length": 64}, False),
        ({"max_context_length": 63, "moe_ep_degree": 1}, False),
        ({"max_context_length": 63, "ctx_batch_size": 2}, False),
        (
            {"max_context_length": 63, "blockwise_matmul_config": SimpleNamespace(block_size=256)},
            False,
        ),
    ],
)
def test_contexts_below_a_block_are_warned_of(
    caplog: pytest.LogCaptureFixture, changes: dict[str, Any], warned: bool
) -> None:
    expert_parallel.check(settings(**changes), EXPERTS, TOP_K)

    assert ("contexts of at least 64 tokens" in caplog.text) is warned


def test_buckets_of_upstreams_own_making_are_counted() -> None:
    many = 256
    few = settings(enable_bucketing=True, batch_size=many, tkg_batch_size=many)

    with pytest.raises(ConfigurationError, match="context encoding with 1 x 128"):
        expert_parallel.check(few, many, 1)
    expert_parallel.check(SimpleNamespace(**vars(few), is_prefix_caching=True), many, 1)
