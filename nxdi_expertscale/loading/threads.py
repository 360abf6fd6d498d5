"""How many threads torch uses for our own work on a state dict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch use one thread, for work that is small.

    Its threads wait for each other at the end of each operation: on a host whose cores are in use,
    a reduction of microseconds takes milliseconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
