"""Refusing to go on where a seam does not hold, with what this reader can do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nxdi_expertscale.errors import IncompatibleUpstreamError
from nxdi_expertscale.families.built_in import BUILT_IN
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.engine import engine
from nxdi_expertscale.hooking.patch import State
from nxdi_expertscale.patches import seams
from nxdi_expertscale.plugins.manager import ALLOW_LIST_VARIABLE, OWN_PLUGIN
from nxdi_expertscale.plugins.registry import families_in_force
from nxdi_expertscale.settings.settings import FLAG

_OTHER_RELEASE = (
    f"Turn {FLAG} off, or install a release that is supported (run 'nxdi-expertscale doctor')"
)
_REMEDIES = {
    State.INCOMPATIBLE: _OTHER_RELEASE,
    State.PARTIAL: (
        "Import nxdi_expertscale before anything that imports NxDI, or set "
        f"{ALLOW_LIST_VARIABLE}={OWN_PLUGIN}, which activates it when Python starts"
    ),
    State.WAITING: (
        "Import the contributed model from a file of its own name, which is how it is found, or "
        f"turn {FLAG} off"
    ),
    State.ABSENT: f"Turn {FLAG} off, or run 'nxdi-expertscale doctor', which says why",
}

_CORRECT_DECLARATION = (
    f"Turn {FLAG} off, or correct the family's declaration in its plugin (MoEFamily: converter, "
    "experts, router, expert_mlps, num_experts, full_precision), which does not fit this model"
)
"""What the author of a family can do: no release of NxDI has its converter."""


def _seams_of_plugins() -> set[str]:
    """The seams of the families that other plugins than ours declare."""
    return {seams.state_dict(family) for family in families_in_force() if family not in BUILT_IN}


def require_seams(names: Sequence[str], *, load: bool = False, may_wait: bool = True) -> None:
    """Refuse to go on without these seams, for a user who has turned the feature on.

    Args:
        names: Names of seams.
        load: Import the modules of these seams that are not imported yet.
        may_wait: Whether a seam may still wait for a module that is in whatever package.

    Raises:
        IncompatibleUpstreamError: One is not patched; the message names it, the reason and what
            to do.
    """
    failure = engine.find_failed_seam(names, load=load, may_wait=may_wait)
    if failure is not None:
        remedy = _REMEDIES[failure.state]
        if failure.state is State.INCOMPATIBLE and failure.seam in _seams_of_plugins():
            remedy = _CORRECT_DECLARATION
        raise IncompatibleUpstreamError(f"{FLAG} cannot work with this NxDI: {failure}. {remedy}")


@contextmanager
def layout_errors(seam: str, family: MoEFamily | None) -> Iterator[None]:
    """Raise what ``loading`` finds unknown in upstream's layout as an error of a seam.

    Args:
        seam: The seam's name.
        family: The model's family. Of one that another plugin declares, the declaration is wrong
            before NxDI is.

    Raises:
        IncompatibleUpstreamError: In place of a ``LayoutError``.
    """
    from nxdi_expertscale.loading.layout import LayoutError

    try:
        yield
    except LayoutError as error:
        remedy = _OTHER_RELEASE if family in BUILT_IN else _CORRECT_DECLARATION
        raise IncompatibleUpstreamError(
            f"the experts' scales cannot be used with this NxDI: seam {seam!r}: {error}. {remedy}"
        ) from error
