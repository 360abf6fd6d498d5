"""The names of the seams, and which of them a model needs."""

from __future__ import annotations

from nxdi_expertscale.families.declaration import MoEFamily

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


def own_loader(family: MoEFamily) -> str:
    """Name of the seam at which a family's own loader is kept from reading another checkpoint."""
    return f"own_loader:{family.name}"


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
    own = () if family.own_loader is None else (own_loader(family),)
    return (*needed_by_config(), state_dict(family), *own)
