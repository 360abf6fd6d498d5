"""Large tensors that are about to be filled, in pages of two megabytes.

The kernel gives memory page by page as it is first written to. For a layer of experts that takes
as long as copying the weights, in pages of four kilobytes.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

import torch

PAGE_BYTES = 1 << 21

_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
"""None where the system has no such advice."""


def use_huge_pages(tensor: torch.Tensor) -> None:
    """Advise the kernel to back a tensor's memory with huge pages, as far as it has not yet.

    It is advice: where the kernel has no such pages, or none to give, nothing changes.

    Args:
        tensor: Any view of the memory.
    """
    if _ADVICE is None or tensor.device.type != "cpu":
        return
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // PAGE_BYTES) * PAGE_BYTES
    end = (storage.data_ptr() + storage.nbytes()) // PAGE_BYTES * PAGE_BYTES
    if end > start:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _ADVICE)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
