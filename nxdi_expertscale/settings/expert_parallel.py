"""What expert parallelism can run, checked before anything is compiled.

Under it each rank holds a share of a layer's experts. NxD's forward
(``neuronx_distributed/modules/moe/expert_mlps_v2.py``) then knows two ways: all local experts for
every token of token generation, and blocks of tokens for a context. Everything else indexes the
local experts by their global numbers, which fails, or reads another expert's weights where a
gather clamps. What it does depends on ``tokens * top_k`` alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nxdi_expertscale.errors import ConfigurationError

_logger = logging.getLogger("nxdi_expertscale")

_DEFAULT_BLOCK_SIZE = 512
"""NxD's own, where a config names none (``modules/moe/model_utils.py``)."""

_SMALLEST_BUCKET = 128
_SMALLEST_PREFIX_BUCKET = 512
"""Where NxDI's own context buckets begin (``modules/autobucketing.py``)."""


@dataclass(frozen=True)
class _Call:
    """One kind of call of a layer's experts, with as few tokens as the config allows.

    Attributes:
        name: What it does, in messages.
        degree: Over how many ranks the experts are spread in it.
        batch: Sequences in it.
        length: Tokens of each sequence.
        needed: What ``tokens * top_k`` has to be at least.
        remedy: The setting that makes it larger, with ``{batch}`` or ``{length}`` for the value.
    """

    name: str
    degree: int
    batch: int
    length: int
    needed: int
    remedy: str


def degrees(neuron_config: Any) -> tuple[int, int]:
    """Expert-parallel degrees in context encoding and in token generation.

    Hybrid sharding has one for each (``HybridShardingConfig`` of NxDI's ``models/config.py``).
    """
    hybrid = getattr(neuron_config, "hybrid_sharding_config", None)
    if hybrid is not None:
        return int(hybrid.moe_cte_ep_degree), int(hybrid.moe_tkg_ep_degree)
    degree = int(getattr(neuron_config, "moe_ep_degree", None) or 1)
    return degree, degree


def check(neuron_config: Any, experts: int, top_k: int) -> None:
    """Make sure that every call of the experts is one that expert parallelism can run.

    Args:
        neuron_config: NxDI's ``NeuronConfig``.
        experts: Number of experts in a layer.
        top_k: Number of experts of a token.

    Raises:
        ConfigurationError: One is not; the message says from which size on it is.
    """
    for call in _calls(neuron_config, experts):
        chosen = call.batch * call.length * top_k
        if call.degree <= 1 or chosen >= call.needed:
            continue
        batch = math.ceil(call.needed / (top_k * call.length))
        length = math.ceil(call.needed / (top_k * call.batch))
        remedy = call.remedy.format(batch=batch, length=length)
        raise ConfigurationError(
            f"expert parallelism (degree {call.degree}): {call.name} with {call.batch} x "
            f"{call.length} tokens and {top_k} of {experts} experts per token chooses {chosen} "
            f"experts, and NxD needs at least {call.needed} for it; use {remedy}, or "
            "moe_ep_degree=1"
        )
    _warn_of_contexts_below_a_block(neuron_config, top_k)


def _calls(neuron_config: Any, experts: int) -> Iterator[_Call]:
    prefill, generation = degrees(neuron_config)
    speculated = _speculation_length(neuron_config)
    batch = _generation_batch(neuron_config)
    remedy = "a batch_size of at least {batch}"
    if speculated > 1:
        # More than one token of a sequence: selective loading below the number of experts, all
        # experts below a block, neither of which is made for a share of the experts.
        several = max(experts, _block_size(neuron_config))
        yield _Call("speculation", generation, batch, speculated, several, remedy)
    else:
        yield _Call("token generation", generation, batch, 1, experts, remedy)
    yield _Call(
        "context encoding",
        prefill,
        _positive(neuron_config, "ctx_batch_size", "batch_size"),
        _shortest_context(neuron_config),
        experts,
        "contexts (context_encoding_buckets, max_context_length) of at least {length} tokens",
    )


def _warn_of_contexts_below_a_block(neuron_config: Any, top_k: int) -> None:
    # Unlike selective loading, which reads another expert's weights, this fails where NxD traces
    # it, without FP8 as well.
    degree, _ = degrees(neuron_config)
    batch = _positive(neuron_config, "ctx_batch_size", "batch_size")
    length = _shortest_context(neuron_config)
    block_size = _block_size(neuron_config)
    if degree > 1 and batch * length * top_k < block_size:
        _logger.warning(
            "expert parallelism (degree %d): contexts of %d x %d tokens are shorter than a block "
            "(block_size %d), and NxD cannot run them over all experts; use contexts of at least "
            "%d tokens, or a smaller block_size in blockwise_matmul_config",
            degree,
            batch,
            length,
            block_size,
            math.ceil(block_size / (top_k * batch)),
        )


def _positive(config: Any, *names: str) -> int:
    """The first of some settings that is set; 1 if none is."""
    return next((int(value) for name in names if (value := getattr(config, name, None))), 1)


def _block_size(neuron_config: Any) -> int:
    blockwise = getattr(neuron_config, "blockwise_matmul_config", None)
    return int(getattr(blockwise, "block_size", None) or _DEFAULT_BLOCK_SIZE)


def _shortest_context(neuron_config: Any) -> int:
    """Length of the shortest context bucket, as ``generate_buckets_for_cte`` makes them."""
    longest = _positive(neuron_config, "max_context_length", "seq_len")
    if not getattr(neuron_config, "enable_bucketing", False):
        return longest
    buckets = getattr(neuron_config, "context_encoding_buckets", None)
    if buckets:
        return min(int(bucket[0] if isinstance(bucket, list) else bucket) for bucket in buckets)
    prefixed = getattr(neuron_config, "is_prefix_caching", False)
    return min(longest, _SMALLEST_PREFIX_BUCKET if prefixed else _SMALLEST_BUCKET)


def _speculation_length(neuron_config: Any) -> int:
    return _positive(neuron_config, "speculation_length", "medusa_speculation_length")


def _generation_batch(neuron_config: Any) -> int:
    """Sequences in the smallest call that generates; attention data parallelism splits none."""
    chunked = getattr(neuron_config, "chunked_prefill_config", None)
    if sequences := getattr(chunked, "max_num_seqs", None):
        return int(sequences)
    if batches := getattr(neuron_config, "token_generation_batches", None):
        return min(int(batch) for batch in batches)
    if _speculation_length(neuron_config) > 1 and not getattr(
        neuron_config, "enable_fused_speculation", False
    ):
        return _positive(neuron_config, "spec_batch_size", "batch_size")
    return _positive(neuron_config, "tkg_batch_size", "batch_size")
