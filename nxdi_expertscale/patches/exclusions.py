"""``modules_to_not_convert`` as NxDI's own functions are to read it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def exclusions_for_upstream(neuron_config: Any, names: Collection[str]) -> Iterator[None]:
    """Give a neuron config other exclusions while NxDI works with it.

    NxDI tests a checkpoint's names and those of its modules in several ways; what a user wrote
    stays in the config.

    Args:
        neuron_config: NxDI's ``NeuronConfig``.
        names: The names that NxDI is to find.
    """
    written = getattr(neuron_config, "modules_to_not_convert", None)
    if list(names) == list(written or ()):
        yield
        return
    neuron_config.modules_to_not_convert = list(names) or None
    try:
        yield
    finally:
        neuron_config.modules_to_not_convert = written
