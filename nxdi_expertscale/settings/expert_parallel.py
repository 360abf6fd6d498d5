"""What expert parallelism can run, found before anything is compiled.

Under it each rank holds a part of a layer's experts. NxD's forward
(``neuronx_distributed/modules/moe/expert_mlps_v2.py``) then knows two ways: all local experts for
every token of token generation, and blocks of tokens for a context. Everything else indexes the
local experts by their global numbers, which fails, or reads another expert's weights where a
gather clamps. What it does depends on ``tokens * top_k`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_DEFAULT_BLOCK_SIZE = 512
"""NxD's own, where a config names none (``modules/moe/model_utils.py``)."""

_SMALLEST_BUCKET = 128
_SMALLEST_PREFIX_BUCKET = 512
"""Where NxDI's own context buckets begin (``modules/autobucketing.py``)."""


@dataclass(frozen=True)
class ExpertParallelism:
    """How the experts are spread over ranks, and the smallest calls of them.

    Attributes:
        ep_degree: Ranks of the whole model's expert parallelism; None where it is not set.
        prefill_degree: Ranks over which the experts are spread in context encoding.
        generation_degree: The same in token generation; hybrid sharding has one for each.
        generation_batch: Sequences in the smallest call that generates tokens.
        context_batch: Sequences in a call that encodes contexts.
        shortest_context: Tokens of the shortest context bucket.
        speculation_length: Tokens of a sequence in a call that generates; 1 without speculation.
        block_size: Tokens of a block, where contexts are computed in blocks.
    """

    ep_degree: int | None
    prefill_degree: int
    generation_degree: int
    generation_batch: int
    context_batch: int
    shortest_context: int
    speculation_length: int
    block_size: int

    @property
    def degree(self) -> int:
        """The larger of the two degrees."""
        return max(self.prefill_degree, self.generation_degree)


@dataclass(frozen=True)
class UnrunnableCall:
    """A call of the experts that NxD cannot run under expert parallelism.

    Attributes:
        degree: Ranks over which the experts are spread in it.
        name: What it does, such as ``token generation``.
        batch: Sequences in it.
        length: Tokens of each sequence.
        chosen: Experts that its tokens choose, ``batch * length * top_k``.
        needed: Experts that they have to choose at least.
        larger: What to set to make the call large enough.
    """

    degree: int
    name: str
    batch: int
    length: int
    chosen: int
    needed: int
    larger: str


@dataclass(frozen=True)
class ShortContext:
    """A context that is shorter than a block.

    Attributes:
        degree: Ranks over which the experts are spread.
        batch: Sequences of a context.
        length: Tokens of each sequence.
        block_size: Tokens of a block.
        needed: Tokens of each sequence from which on it is as long as a block.
    """

    degree: int
    batch: int
    length: int
    block_size: int
    needed: int


def read_expert_parallelism(neuron_config: Any) -> ExpertParallelism:
    """Read how NxDI's ``NeuronConfig`` spreads the experts over ranks."""
    prefill, generation = _degrees(neuron_config)
    ep_degree = getattr(neuron_config, "ep_degree", None)
    blockwise = getattr(neuron_config, "blockwise_matmul_config", None)
    return ExpertParallelism(
        ep_degree=None if ep_degree is None else int(ep_degree),
        prefill_degree=prefill,
        generation_degree=generation,
        generation_batch=_generation_batch(neuron_config),
        context_batch=_first_set(neuron_config, "ctx_batch_size", "batch_size"),
        shortest_context=_shortest_context(neuron_config),
        speculation_length=_speculation_length(neuron_config),
        block_size=int(getattr(blockwise, "block_size", None) or _DEFAULT_BLOCK_SIZE),
    )


def find_unrunnable_call(
    parallelism: ExpertParallelism, num_experts: int, top_k: int
) -> UnrunnableCall | None:
    """Find a call of the experts that expert parallelism cannot run, or None.

    Args:
        parallelism: How the experts are spread.
        num_experts: Experts of a layer.
        top_k: Experts of a token.
    """
    return next(
        (
            call
            for call in _calls(parallelism, num_experts, top_k)
            if call.degree > 1 and call.chosen < call.needed
        ),
        None,
    )


def find_short_context(parallelism: ExpertParallelism, top_k: int) -> ShortContext | None:
    """Find contexts that are shorter than a block, or None.

    NxD runs them over all experts, which under expert parallelism fails where it is traced,
    without FP8 as well.
    """
    degree, batch = parallelism.prefill_degree, parallelism.context_batch
    length, block_size = parallelism.shortest_context, parallelism.block_size
    if degree <= 1 or batch * length * top_k >= block_size:
        return None
    return ShortContext(degree, batch, length, block_size, math.ceil(block_size / (top_k * batch)))


def _calls(
    parallelism: ExpertParallelism, num_experts: int, top_k: int
) -> Iterator[UnrunnableCall]:
    """The smallest calls of each kind, whether they can run or not."""
    batch, length = parallelism.generation_batch, parallelism.speculation_length
    name, needed = "token generation", num_experts
    if length > 1:
        # More than one token of a sequence: selective loading below the number of experts, all
        # experts below a block, neither of which is made for a part of the experts.
        name, needed = "speculation", max(num_experts, parallelism.block_size)
    yield UnrunnableCall(
        parallelism.generation_degree,
        name,
        batch,
        length,
        batch * length * top_k,
        needed,
        f"a batch_size of at least {math.ceil(needed / (top_k * length))}",
    )
    batch, length = parallelism.context_batch, parallelism.shortest_context
    yield UnrunnableCall(
        parallelism.prefill_degree,
        "context encoding",
        batch,
        length,
        batch * length * top_k,
        num_experts,
        "contexts (context_encoding_buckets, max_context_length) of at least "
        f"{math.ceil(num_experts / (top_k * batch))} tokens",
    )


def _degrees(neuron_config: Any) -> tuple[int, int]:
    """Degrees in context encoding and in token generation.

    Hybrid sharding has one for each (``HybridShardingConfig`` of NxDI's ``models/config.py``).
    """
    hybrid = getattr(neuron_config, "hybrid_sharding_config", None)
    if hybrid is not None:
        return int(hybrid.moe_cte_ep_degree), int(hybrid.moe_tkg_ep_degree)
    degree = int(getattr(neuron_config, "moe_ep_degree", None) or 1)
    return degree, degree


def _first_set(config: Any, *names: str) -> int:
    """The first of some settings that is set; 1 if none is."""
    return next((int(value) for name in names if (value := getattr(config, name, None))), 1)


def _shortest_context(neuron_config: Any) -> int:
    """Length of the shortest context bucket, as ``generate_buckets_for_cte`` makes them."""
    longest = _first_set(neuron_config, "max_context_length", "seq_len")
    if not getattr(neuron_config, "enable_bucketing", False):
        return longest
    buckets = getattr(neuron_config, "context_encoding_buckets", None)
    if buckets:
        return min(int(bucket[0] if isinstance(bucket, list) else bucket) for bucket in buckets)
    prefixed = getattr(neuron_config, "is_prefix_caching", False)
    return min(longest, _SMALLEST_PREFIX_BUCKET if prefixed else _SMALLEST_BUCKET)


def _speculation_length(neuron_config: Any) -> int:
    return _first_set(neuron_config, "speculation_length", "medusa_speculation_length")


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
        return _first_set(neuron_config, "spec_batch_size", "batch_size")
    return _first_set(neuron_config, "tkg_batch_size", "batch_size")
