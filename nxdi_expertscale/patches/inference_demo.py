"""The seam ``neuronx_distributed_inference.inference_demo``: the flag on its command line."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from nxdi_expertscale.hooking.code import refers_to
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import seams
from nxdi_expertscale.settings.settings import FLAG

MODULE = "neuronx_distributed_inference.inference_demo"
OPTION = "--expert-wise-scale"


def patches() -> list[Patch]:
    """The option ``--expert-wise-scale`` of ``inference_demo run``."""
    return [
        Patch(
            seam=seams.INFERENCE_DEMO,
            module=MODULE,
            attribute="setup_run_parser",
            wrapper=_add_option,
            find_incompatibility=_incompatibility,
            is_native=_is_native,
        )
    ]


def _is_native(module: ModuleType) -> bool:
    return any(refers_to(module.setup_run_parser, name) for name in (FLAG, OPTION))


def _incompatibility(module: ModuleType) -> str | None:
    try:
        inspect.signature(module.setup_run_parser).bind(argparse.ArgumentParser())
    except TypeError as error:
        return f"setup_run_parser is not called with a parser: {error}"
    if not refers_to(getattr(module, "create_neuron_config", None), "vars"):
        return "create_neuron_config does not hand every argument to the config"
    return None


def _add_option(
    wrapped: Callable[..., None], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    wrapped(*args, **kwargs)
    parser = inspect.signature(wrapped).bind(*args, **kwargs).args[0]
    # Every argument that has a value goes to the config: not given, this one has none.
    parser.add_argument(
        OPTION,
        dest=FLAG,
        action="store_true",
        default=argparse.SUPPRESS,
        help="FP8 experts keep one scale each (added by nxdi-expertscale)",
    )
