"""What the checks of ``doctor`` find."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something that a user should know, in one sentence.

    Attributes:
        text: The sentence: what it is, and what to do.
        is_problem: Whether ``expert_wise_scale=True`` will not work because of it. What is no
            problem is a warning.
    """

    text: str
    is_problem: bool


def problem(text: str) -> Finding:
    """Something because of which it will not work."""
    return Finding(text, is_problem=True)


def warning(text: str) -> Finding:
    """Something that does not stop it."""
    return Finding(text, is_problem=False)
