"""The names of the seams, and which of them a user of the feature cannot do without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nxdi_expertscale.errors import IncompatibleUpstreamError
from nxdi_expertscale.families.built_in import BUILT_IN
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.engine import engine
from nxdi_expertscale.hooking.patch import State
from nxdi_expertscale.plugins.manager import ALLOW_LIST_VARIABLE, OWN_PLUGIN
from nxdi_expertscale.plugins.registry import families_in_force
from nxdi_expertscale.settings.settings import FLAG

CONFIG = "config"
INFERENCE_CONFIG = "inference_config"
FLAG_GUARD = "flag_guard"
CONFIG_TO_JSON = "config_to_json"
CONFIG_FROM_JSON = "config_from_json"
QUANTIZATION = "quantization"
LOAD_MODULE = "load_module"
ALIASES = "aliases"
PRESHARD = "preshard"
COMPILATION = "compilation"
LOAD_STATE_DICT = "load_state_dict"
SAVE_QUANTIZED = "save_quantized"
LOAD_COMPILED = "load_compiled"
COMPILED_ARTIFACTS = "compiled_artifacts"
TIED_EMBEDDINGS = "tied_embeddings"
INFERENCE_DEMO = "inference_demo"


def state_dict(family: MoEFamily) -> str:
    """Name of the seam at which a family's state dict is converted."""
    return f"state_dict:{family.name}"


def needed_by_config() -> tuple[str, ...]:
    """The seams that every model needs.

    Not among them: ``save_quantized``, without which NxDI makes the checkpoint itself, one that
    loads as well; ``inference_demo``, which is one way to set the flag; those where a compiled
    model is loaded, which is often one that was compiled before; ``tied_embeddings``, without which
    NxDI fails; ``compilation`` and ``load_state_dict``, without which weights are checked after the
    compilation only; and ``aliases``, without which a model's own states are taken for weights.
    """
    return (
        CONFIG,
        INFERENCE_CONFIG,
        CONFIG_TO_JSON,
        CONFIG_FROM_JSON,
        QUANTIZATION,
        LOAD_MODULE,
        PRESHARD,
    )


def needed_by_model(family: MoEFamily) -> tuple[str, ...]:
    """The seams that a model of this family needs."""
    return (*needed_by_config(), state_dict(family))


_OTHER_RELEASE = (
    f"Turn {FLAG} off, or install a release that is supported (run 'nxdi-expertscale doctor')"
)
_REMEDIES = {
    State.INCOMPATIBLE: _OTHER_RELEASE,
    State.PARTIAL: (
        "Import nxdi_expertscale before anything that imports NxDI, or set "
        f"{ALLOW_LIST_VARIABLE}={OWN_PLUGIN}, which activates it when Python starts"
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
    return {state_dict(family) for family in families_in_force() if family not in BUILT_IN}


def require_seams(names: Sequence[str], *, load: bool = False) -> None:
    """Refuse to go on without these seams, for a user who has turned the feature on.

    Args:
        names: Names of seams.
        load: Import the modules of these seams that are not imported yet.

    Raises:
        IncompatibleUpstreamError: One is not patched; the message names it, the reason and what
            to do.
    """
    failure = engine.find_failed_seam(names, load=load)
    if failure is not None:
        remedy = _REMEDIES[failure.state]
        if failure.state is State.INCOMPATIBLE and failure.seam in _seams_of_plugins():
            remedy = _CORRECT_DECLARATION
        raise IncompatibleUpstreamError(f"{FLAG} cannot work with this NxDI: {failure}. {remedy}")


@contextmanager
def layout_errors(seam: str, family: MoEFamily) -> Iterator[None]:
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
