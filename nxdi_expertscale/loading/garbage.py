"""Python's search for garbage, while NxDI asks for one after each layer.

A search looks at every object of the process: with torch and transformers imported, it takes as
long as a layer's weights. What the converters drop is freed at once, and is never found by it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_new_objects_searched() -> Iterator[None]:
    """Have ``gc.collect()`` look at nothing that is older than this context.

    A process that keeps its objects out of the search itself (``gc.freeze``) is left alone.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
