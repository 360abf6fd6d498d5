"""NxD's parallel state on a CPU, for one rank or for several."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch.distributed


@contextlib.contextmanager
def parallel_state(rank: int, ranks: int, store: Path) -> Iterator[None]:
    """Be one of the ranks of a tensor-parallel group.

    Args:
        rank: This process's rank.
        ranks: How many there are.
        store: A file, not there yet, in which the ranks find each other.
    """
    from neuronx_distributed.parallel_layers import parallel_state as state

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
    )
    state.initialize_model_parallel(tensor_model_parallel_size=ranks, skip_collective_init=True)
    # As NxD's trace does: weights come from the checkpoint alone. (From 0.7 on, initializing a
    # quantized row-parallel weight for more than one rank fails in upstream itself.)
    state.set_aot_mode(True)
    try:
        yield
    finally:
        state.set_aot_mode(False)
        state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Be the one rank there is, unless this process is one already."""
    from neuronx_distributed.parallel_layers import parallel_state as state

    if state.model_parallel_is_initialized():
        yield
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        parallel_state(0, 1, Path(folder, "store")),
    ):
        yield
