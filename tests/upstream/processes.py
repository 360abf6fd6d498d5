"""Functions in processes of their own: what happens once in a process, and several ranks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from tests.upstream import targets

Result = TypeVar("Result")

_SECONDS = 300
"""After which a process is given up."""


def run_fresh(target: targets.Target, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a process that has imported nothing of NxDI yet.

    Args:
        target: What can be imported there.
        function: A function of a module; what it returns has to be picklable.
        arguments: What it is called with.
    """
    with _processes(target, 1) as pool:
        return pool.submit(function, *arguments).result(_SECONDS)


def run_on_ranks(
    target: targets.Target,
    ranks: int,
    store: Path,
    function: Callable[..., Result],
    *arguments: Any,
) -> list[Result]:
    """Call a function on each rank of a tensor-parallel group, with the rank before its arguments.

    Args:
        target: What can be imported there.
        ranks: How many there are.
        store: A file, not there yet, in which the ranks find each other.
        function: A function of a module; what it returns has to be picklable.
        arguments: What it is called with, after the rank.
    """
    with _processes(target, ranks) as pool:
        calls = [
            pool.submit(_run_as_rank, rank, ranks, store, function, *arguments)
            for rank in range(ranks)
        ]
        # The first to fail is the cause; the others then fail because a rank is gone.
        for call in as_completed(calls, _SECONDS):
            call.result()
        return [call.result() for call in calls]


def _processes(target: targets.Target, count: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, initializer=target.prepare)


def _run_as_rank(
    rank: int, ranks: int, store: Path, function: Callable[..., Result], *arguments: Any
) -> Result:
    from tests.upstream.ranks import parallel_state

    with parallel_state(rank, ranks, store):
        return function(rank, *arguments)
