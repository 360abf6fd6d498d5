"""What NxDI itself computes wrongly, or cannot load, of the models of a family.

A limit looks at the config of the model alone: a ``config.json``, or NxDI's own config object.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

ALWAYS = 1
"""What a limit starts at that concerns sequences of any length."""

RELEASES = "0.5 to 0.9"
"""The releases of NxDI that have these limits; newer ones have no public source."""


class Effect(str, enum.Enum):
    """What comes of a limit."""

    WRONG = "it answers wrongly"
    FAILS = "it cannot run the model"
    INEXACT = "its answers differ slightly"
    """By less than what FP8 costs."""


@dataclass(frozen=True)
class Limit:
    """One thing that NxDI does not do as the model's config asks.

    Attributes:
        field: The field of the config that asks for it.
        starts_at: For a config, the length in tokens of the shortest sequence that is concerned:
            1 for all, None where the config does not ask for it.
        problem: What NxDI does instead.
        effect: What comes of it.
        remedy: What to do instead; ``{length}`` stands for the longest sequence that is not
            concerned.
    """

    field: str
    starts_at: Callable[[Any], int | None]
    problem: str
    effect: Effect
    remedy: str = "serve this model with another engine"


@dataclass(frozen=True)
class ReachedLimit:
    """A limit that a model's config reaches.

    Attributes:
        limit: The limit.
        starts_at: Tokens of the shortest sequence that is concerned; 1 for all.
    """

    limit: Limit
    starts_at: int

    @property
    def problem(self) -> str:
        """What NxDI does, what comes of it, and from which length on."""
        lengths = "" if self.starts_at == ALWAYS else f" from {self.starts_at} tokens on"
        return (
            f"{self.limit.problem}, so that {self.limit.effect.value}{lengths}; this is a limit of "
            f"NxDI itself ({RELEASES}), without FP8 as well"
        )

    @property
    def remedy(self) -> str:
        """What to do instead."""
        return self.limit.remedy.format(length=self.starts_at - 1)


def find_reached(limits: Iterable[Limit], config: Any) -> tuple[ReachedLimit, ...]:
    """The limits that a model's config reaches.

    Args:
        limits: Those of its family.
        config: What the model's ``config.json`` holds, or NxDI's config object.
    """
    found = ((limit, limit.starts_at(config)) for limit in limits)
    return tuple(ReachedLimit(limit, start) for limit, start in found if start is not None)
