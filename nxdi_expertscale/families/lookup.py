"""Finds the family of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.unsupported import why_unsupported


def family_of(model_type: str | None, families: Sequence[MoEFamily]) -> MoEFamily | None:
    """The family that a ``model_type`` belongs to, or None."""
    return next((family for family in families if model_type in family.model_types), None)


def require_family(model_type: str | None, families: Sequence[MoEFamily], where: str) -> MoEFamily:
    """The family that a ``model_type`` belongs to.

    Raises:
        CheckpointError: No family has this model type; the message says why, or lists those that
            exist.
    """
    family = family_of(model_type, families)
    if family is None:
        reason = why_unsupported(model_type)
        if reason is not None:
            raise CheckpointError(f"{where}: model_type {model_type!r} is not supported: {reason}")
        known = ", ".join(sorted(_model_types(families))) or "none"
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not a mixture-of-experts model that is "
            f"supported; supported are: {known}"
        )
    return family


def _model_types(families: Sequence[MoEFamily]) -> Iterator[str]:
    for family in families:
        yield from family.model_types
