"""Functions in processes of their own: what happens once in a process, and several ranks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.context import BaseContext, ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

from tests.harness import targets
from tests.harness.limits import PATIENCE

Result = TypeVar("Result")

_QUANTIZER = ("nxdi_expertscale.checkpoint.quantize", "nxdi_expertscale.checkpoint.write.stream")
"""What ``quantize_checkpoint`` imports, the latter when it begins to write; torch is among it."""


def quantizing_context(*modules: str) -> ForkServerContext:
    """Where processes come from that quantize: forks of one that has all of it imported.

    What is killed or disturbed there is the work, and not the imports.

    Args:
        modules: What else is imported.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_QUANTIZER, *modules])
    return context


def run_on_ranks(
    target: targets.Target,
    ranks: int,
    store: Path,
    function: Callable[..., Result],
    *arguments: Any,
) -> list[Result]:
    """Call a function in a fresh process for each rank of a tensor-parallel group.

    Nothing of NxDI is imported there but what the function and its module import; see
    :mod:`tests.harness.preloaded` for what else is.

    Args:
        target: What can be imported there.
        ranks: How many there are.
        store: A file, not there yet, in which the ranks find each other.
        function: A function of a module, which is called with its rank and the arguments; what
            it returns has to be picklable.
        arguments: What it is called with, after the rank.
    """
    with ProcessPoolExecutor(ranks, context_of(target), initializer=target.prepare) as pool:
        calls = [
            pool.submit(_run_as_rank, rank, ranks, store, function, *arguments)
            for rank in range(ranks)
        ]
        # The first to fail is the cause; the others then fail because a rank is gone.
        for call in as_completed(calls, PATIENCE):
            call.result()
        return [call.result() for call in calls]


def context_of(target: targets.Target) -> BaseContext:
    """Where processes come from: a fresh interpreter, or a fork of one that has the libraries.

    Importing them takes longer than what most tests do there; the fork is for the target of this
    process alone.
    """
    if targets.target_of_this_process() != target:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preloaded"])
    return context


def _run_as_rank(
    rank: int, ranks: int, store: Path, function: Callable[..., Result], *arguments: Any
) -> Result:
    from nxdi_expertscale.testing.ranks import parallel_state

    with parallel_state(rank, ranks, store):
        return function(rank, *arguments)


def run_alone(
    target: targets.Target,
    prepare: Callable[[Path], None],
    folder: Path,
    function: Callable[..., Result],
    *arguments: Any,
) -> Result:
    """Call a function in a fresh process, without a parallel state.

    Args:
        target: What can be imported there.
        prepare: Called first, with the folder, before anything of NxDI is imported.
        folder: A folder for what upstream writes.
        function: A function of a module; what it returns has to be picklable.
        arguments: What it is called with.
    """
    with ProcessPoolExecutor(1, context_of(target), initializer=target.prepare) as pool:
        pool.submit(prepare, folder).result(PATIENCE)
        return pool.submit(function, *arguments).result(PATIENCE)
