"""Expert parallelism's limits, from settings alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nxdi_expertscale.settings.expert_parallel import (
    ShortContext,
    UnrunnableCall,
    find_short_context,
    find_unrunnable_call,
    read_expert_parallelism,
)

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


def unrunnable(config: Any, experts: int = EXPERTS, top_k: int = TOP_K) -> UnrunnableCall | None:
    return find_unrunnable_call(read_expert_parallelism(config), experts, top_k)


def short_context(config: Any) -> ShortContext | None:
    return find_short_context(read_expert_parallelism(config), TOP_K)


def test_without_the_settings_there_is_one_rank() -> None:
    parallelism = read_expert_parallelism(SimpleNamespace())

    assert (parallelism.prefill_degree, parallelism.generation_degree) == (1, 1)
    assert (parallelism.degree, parallelism.ep_degree) == (1, None)
    assert unrunnable(SimpleNamespace(batch_size=1)) is None


def test_hybrid_sharding_has_degrees_of_its_own() -> None:
    hybrid = SimpleNamespace(moe_cte_ep_degree=2, moe_tkg_ep_degree=8)
    parallelism = read_expert_parallelism(settings(hybrid_sharding_config=hybrid))

    assert (parallelism.prefill_degree, parallelism.generation_degree) == (2, 8)
    assert parallelism.degree == 8


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_context_length": 64},
        {"tkg_batch_size": 1, "moe_ep_degree": 1},
        {"tkg_batch_size": 1, "moe_ep_degree": None},
        {"tkg_batch_size": 16, "speculation_length": 4},
        {"enable_bucketing": True},
        {"enable_bucketing": True, "context_encoding_buckets": [64, 4096]},
        {"enable_bucketing": True, "context_encoding_buckets": [[64, 0], [4096, 512]]},
        {"token_generation_batches": [16, 32]},
        {"tkg_batch_size": 1, "spec_batch_size": 16, "speculation_length": 4},
        {"batch_size": 1, "chunked_prefill_config": SimpleNamespace(max_num_seqs=16)},
        {"chunked_prefill_config": SimpleNamespace(max_num_seqs=0)},
        {
            "tkg_batch_size": 1,
            "hybrid_sharding_config": SimpleNamespace(moe_cte_ep_degree=2, moe_tkg_ep_degree=1),
        },
    ],
)
def test_enough_tokens_can_run(changes: dict[str, Any]) -> None:
    assert unrunnable(settings(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tkg_batch_size": 15}, ("token generation", 15, 1, "a batch_size of at least 16")),
        (
            {"token_generation_batches": [4, 16]},
            ("token generation", 4, 1, "a batch_size of at least 16"),
        ),
        (
            {"chunked_prefill_config": SimpleNamespace(max_num_seqs=8)},
            ("token generation", 8, 1, "a batch_size of at least 16"),
        ),
        (
            {
                "tkg_batch_size": 15,
                "moe_ep_degree": 1,
                "hybrid_sharding_config": SimpleNamespace(moe_cte_ep_degree=1, moe_tkg_ep_degree=2),
            },
            ("token generation", 15, 1, "a batch_size of at least 16"),
        ),
        (
            {"max_context_length": 15},
            (
                "context encoding",
                1,
                15,
                "contexts (context_encoding_buckets, max_context_length) of at least 16 tokens",
            ),
        ),
        (
            {"enable_bucketing": True, "context_encoding_buckets": [8, 4096]},
            (
                "context encoding",
                1,
                8,
                "contexts (context_encoding_buckets, max_context_length) of at least 16 tokens",
            ),
        ),
        (
            {"tkg_batch_size": 15, "speculation_length": 4, "enable_fused_speculation": True},
            ("speculation", 15, 4, "a batch_size of at least 16"),
        ),
        (
            {"medusa_speculation_length": 2},
            ("speculation", 16, 2, "a batch_size of at least 32"),
        ),
    ],
)
def test_too_few_tokens_are_found_with_what_is_enough(
    changes: dict[str, Any], expected: tuple[str, int, int, str]
) -> None:
    call = unrunnable(settings(**changes))

    assert call is not None
    assert (call.name, call.batch, call.length, call.larger) == expected
    assert call.chosen == call.batch * call.length * TOP_K < call.needed


@pytest.mark.parametrize(
    ("experts", "top_k", "smallest"), [(128, 8, 16), (8, 2, 4), (10, 3, 4), (9, 3, 3), (8, 8, 1)]
)
def test_smallest_batch_chooses_every_expert(experts: int, top_k: int, smallest: int) -> None:
    assert unrunnable(settings(tkg_batch_size=smallest), experts, top_k) is None
    if smallest > 1:
        call = unrunnable(settings(tkg_batch_size=smallest - 1), experts, top_k)
        assert call is not None
        assert call.larger == f"a batch_size of at least {smallest}"


@pytest.mark.parametrize(
    ("changes", "is_short"),
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
def test_contexts_below_a_block_are_found(changes: dict[str, Any], is_short: bool) -> None:
    found = short_context(settings(**changes))

    assert found == (ShortContext(4, 1, 63, 512, 64) if is_short else None)


def test_buckets_of_upstreams_own_making_are_counted() -> None:
    many = 256
    few = settings(enable_bucketing=True, batch_size=many, tkg_batch_size=many)

    call = unrunnable(few, many, 1)
    assert call is not None
    assert (call.name, call.batch, call.length) == ("context encoding", 1, 128)
    assert unrunnable(SimpleNamespace(**vars(few), is_prefix_caching=True), many, 1) is None
