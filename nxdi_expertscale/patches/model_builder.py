"""The seam ``neuronx_distributed.trace.model_builder``: before anything is compiled.

NxD compiles a model first, for minutes or hours, and only then reads its weights. The checks of the
weights against the model are made beforehand too, on the names, shapes and dtypes alone.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from nxdi_expertscale.hooking.code import refers_to
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import checkpoint_loader, seams, trace
from nxdi_expertscale.settings.settings import read_settings

MODULE = "neuronx_distributed.trace.model_builder"

_logger = logging.getLogger("nxdi_expertscale")


def patches() -> list[Patch]:
    """The check of names and shapes, ahead of ``ModelBuilder.trace``."""
    return [
        Patch(
            seam=seams.COMPILATION,
            module=MODULE,
            attribute="ModelBuilder.trace",
            wrapper=_trace,
            find_incompatibility=_find_incompatibility,
        )
    ]


def _find_incompatibility(module: ModuleType) -> str | None:
    sharding = getattr(module.ModelBuilder, "shard_checkpoint", None)
    used = ("checkpoint_loader", "preprocess_checkpoint", "model_collection")
    missing = [name for name in used if not refers_to(sharding, name)]
    return f"ModelBuilder.shard_checkpoint does not use {missing[0]}" if missing else None


def _trace(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if _asks_for_expert_wise_scales(instance):
        check_without_values(instance)
    return wrapped(*args, **kwargs)


def _asks_for_expert_wise_scales(builder: Any) -> bool:
    for container in builder.model_collection.values():
        config = getattr(container.model_instance, "config", None)
        settings = read_settings(getattr(config, "neuron_config", None))
        if settings.is_on and settings.is_quantized:
            return True
    return False


def check_without_values(builder: Any) -> None:
    """Take a model's weights to it without their values, which takes no memory and little time.

    It is the beginning of what NxD does with them after the compilation
    (``ModelBuilder.shard_checkpoint``), so the checks that are made on this way are made here.

    Raises:
        ExpertScaleError: The weights do not fit the model, or its config.
    """
    if not checkpoint_loader.reads_through_load_state_dict(builder.checkpoint_loader):
        _warn_of_late_check("the model reads them in its own way")
        return
    parallel_state = importlib.import_module("neuronx_distributed.parallel_layers.parallel_state")
    was_initialized = parallel_state.model_parallel_is_initialized()
    checked = copy.copy(builder)
    checked.checkpoint_loader = checkpoint_loader.without_values(builder.checkpoint_loader)
    try:
        with contextlib.suppress(trace.CheckedWithoutValues), _without_garbage():
            checked.shard_checkpoint()
    except (NotImplementedError, RuntimeError) as error:
        # A converter that looks at values, which meta tensors do not have.
        if "meta" not in str(error).lower():
            raise
        _warn_of_late_check(f"the model's converter needs their values: {error}")
    finally:
        if not was_initialized and parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()


def _warn_of_late_check(reason: str) -> None:
    _logger.warning("the checkpoint's tensors are checked after the compilation: %s", reason)


@contextlib.contextmanager
def _without_garbage() -> Iterator[None]:
    """Keep NxDI's converters, which collect garbage for every layer, to what is made here."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
