"""Work through many items with a few threads; torch leaves them all of the cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from nxdi_expertscale.display.progress import Progress

MAX_WORKERS = 32
"""More gain nothing: Python's own part of the work is done by one thread at a time."""

Item = TypeVar("Item")


def available_cores() -> int:
    """Cores that this process may use, as far as they are of use."""
    # macOS does not bind processes to cores.
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def for_each(work: Callable[[Item], None], items: Iterator[Item], workers: int) -> None:
    """Call ``work`` with each item, in several threads; items are taken one at a time, in order.

    The first exception, or an interrupt, stops all threads after the item they are at, and is
    raised.

    Args:
        work: What is done with an item.
        items: The items.
        workers: Number of threads.
    """
    import torch  # Only who has work for threads needs it: an error is told without.

    taking = threading.Lock()
    stop = threading.Event()

    def run() -> None:
        # Each worker is one core's load; torch's own threads on top would only wait for each other.
        torch.set_num_threads(1)
        while not stop.is_set():
            with taking:
                item = next(items, None)
            if item is None:
                return
            work(item)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(run) for _ in range(workers)]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
        for job in jobs:
            job.result()
    finally:
        torch.set_num_threads(threads)


class Meter:
    """Counts bytes that are done, from any thread, and reports them."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """Count bytes as done."""
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)
