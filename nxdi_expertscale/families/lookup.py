"""Finds the family of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.unsupported import find_unsupported
from nxdi_expertscale.hooking.module_names import matches_name

HOW_TO_DECLARE = (
    "A model with experts that NxDI runs, or a contribution to it, becomes supported by a plugin "
    "that declares a MoEFamily for it, which is names and no code (CONTRIBUTING.md, 'Adding a "
    "model')"
)
"""What a user of an unknown model can do."""


def family_of(
    model_type: str | None, families: Sequence[MoEFamily], modules: Collection[str] = ()
) -> MoEFamily | None:
    """The family that a model belongs to, or None for a dense or unknown model.

    Args:
        model_type: The model's type, if it has one.
        families: The families that are in force.
        modules: Modules that define its config, by which it is known where it has no type.
    """
    for family in families:
        if model_type in family.model_types:
            return family
        if not model_type and any(
            matches_name(known, name)
            for known in (family.module, *family.config_modules)
            for name in modules
        ):
            return family
    return None


def require_family(model_type: str | None, families: Sequence[MoEFamily], where: str) -> MoEFamily:
    """The family that a ``model_type`` belongs to.

    Raises:
        CheckpointError: No family has this model type; the message says why, or lists those that
            exist.
    """
    family = family_of(model_type, families)
    if family is None:
        unsupported = find_unsupported(model_type)
        if unsupported is not None:
            raise CheckpointError(
                f"{where}: model_type {model_type!r} is not supported: {unsupported.explanation}; "
                f"{unsupported.remedy}"
            )
        known = ", ".join(sorted(_model_types(families))) or "none"
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not a mixture-of-experts model that is "
            f"supported; supported are: {known}. {HOW_TO_DECLARE}"
        )
    return family


def _model_types(families: Sequence[MoEFamily]) -> Iterator[str]:
    for family in families:
        yield from family.model_types
