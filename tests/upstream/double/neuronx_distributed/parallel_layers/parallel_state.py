"""The process groups. Every rank is a rank of one tensor-parallel group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

_groups: dict[str, Any] = {}


@dataclass(frozen=True)
class MockedGroup:
    """A group that nothing is sent through."""

    ranks: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return 0


@contextmanager
def mocked_ranks(ranks: int) -> Iterator[None]:
    """Be the first of some ranks, to build modules; none is left afterwards."""
    _groups.update(tensor=MockedGroup(ranks), expert=MockedGroup(1))
    yield
    _groups.clear()


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    skip_collective_init: bool = False,
    **_: Any,
) -> None:
    assert (pipeline_model_parallel_size, expert_model_parallel_size) == (1, 1)
    assert tensor_model_parallel_size == dist.get_world_size()
    _groups["tensor"] = dist.new_group(list(range(dist.get_world_size())))
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    _groups["expert"] = alone[dist.get_rank()]


def set_aot_mode(mode: bool) -> None:
    """Nothing to do: the double initializes no weight, ahead-of-time mode or not."""


def destroy_model_parallel() -> None:
    _groups.clear()


def model_parallel_is_initialized() -> bool:
    return bool(_groups)


def get_tensor_model_parallel_group() -> dist.ProcessGroup:
    return _groups["tensor"]


def get_tensor_model_parallel_size() -> int:
    return get_tensor_model_parallel_group().size()


def get_tensor_model_parallel_rank() -> int:
    return get_tensor_model_parallel_group().rank()


def get_expert_model_parallel_group() -> dist.ProcessGroup:
    return _groups["expert"]


def get_expert_model_parallel_size() -> int:
    return get_expert_model_parallel_group().size()
