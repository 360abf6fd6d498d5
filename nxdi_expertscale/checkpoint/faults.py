"""What can be wrong with a finished folder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a finished folder.

    Attributes:
        where: The file or the tensor.
        what: What is wrong with it.
    """

    where: str
    what: str
