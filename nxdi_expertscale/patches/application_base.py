"""The seam ``neuronx_distributed_inference.models.application_base``: the checkpoint, made once.

vLLM-Neuron and inference_demo have NxDI quantize the model on every compile, all of it in memory
and over whatever is at ``quantized_checkpoints_path``. With the flag on, a finished folder there
is used, and one that is not there is made as ``nxdi-expertscale quantize`` makes it.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from nxdi_expertscale.errors import CheckpointError, CheckpointInUseError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.code import refers_to
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import seams
from nxdi_expertscale.settings import flag

MODULE = "neuronx_distributed_inference.models.application_base"

QUANTIZED_DTYPE = "f8e4m3"
"""The ``quantization_dtype`` of what our quantizer makes."""

_SECONDS_BETWEEN_LOOKS = 2.0

_logger = logging.getLogger("nxdi_expertscale")


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """The folder that is made once, around ``save_quantized_state_dict``."""
    return [
        Patch(
            seam=seams.SAVE_QUANTIZED,
            module=MODULE,
            attribute="NeuronApplicationBase.save_quantized_state_dict",
            wrapper=_saving(families),
            find_incompatibility=_incompatibility,
        )
    ]


def _incompatibility(module: ModuleType) -> str | None:
    save = module.NeuronApplicationBase.save_quantized_state_dict
    try:
        inspect.signature(save).bind("model_path", None)
    except TypeError as error:
        return f"save_quantized_state_dict is not called with (path, config): {error}"
    if not refers_to(save, "quantized_checkpoints_path"):
        return "save_quantized_state_dict does not write to quantized_checkpoints_path"
    return None


def _saving(families: Sequence[MoEFamily]) -> Callable[..., Any]:
    def save_quantized_state_dict(
        wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        model_path, config = inspect.signature(wrapped).bind(*args, **kwargs).args
        neuron_config = config.neuron_config
        if not flag.is_on(neuron_config) or not flag.is_quantized(neuron_config):
            return wrapped(*args, **kwargs)
        source, folder = Path(model_path), Path(neuron_config.quantized_checkpoints_path)
        exclusions = flag.exclusions(neuron_config)
        reason = _why_not_ours(source, neuron_config, flag.family_of_model(config, families))
        if reason is None:
            provide(source, folder, exclusions)
            return None
        _leave_to_upstream(folder, reason)
        return wrapped(*args, **kwargs)

    return save_quantized_state_dict


def _why_not_ours(source: Path, neuron_config: Any, family: MoEFamily | None) -> str | None:
    """Why our quantizer does not take a source, or None where it does."""
    from nxdi_expertscale.checkpoint.read.files import INDEX, SINGLE_FILE

    dtype = str(getattr(neuron_config, "quantization_dtype", None))
    if family is None:
        return "it is no mixture-of-experts model of a known family"
    if dtype.lower() != QUANTIZED_DTYPE:
        return f"quantization_dtype is {dtype!r}, not {QUANTIZED_DTYPE!r}"
    if not source.is_dir():
        return f"{source} is no local folder"
    if not any((source / name).exists() for name in (SINGLE_FILE, INDEX)):
        return f"{source} has no safetensors files"
    return None


def _leave_to_upstream(folder: Path, reason: str) -> None:
    from nxdi_expertscale.checkpoint.write.manifest import MANIFEST

    if (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{folder}: was made by nxdi-expertscale quantize from another source, and NxDI would "
            f"write over it, because {reason}; name another quantized_checkpoints_path"
        )
    _logger.warning("the checkpoint is quantized by NxDI itself, in memory: %s", reason)
    if not folder.exists():
        # NxDI writes safetensors to a folder that exists, and a pickle to any other path.
        folder.mkdir(parents=True)


def provide(source: Path, folder: Path, exclusions: Sequence[str]) -> None:
    """See to it that a folder is the finished FP8 checkpoint of a source.

    One that is there is used; otherwise it is made. If another process is making it, this one
    waits.

    Args:
        source: The original checkpoint, or the finished folder itself.
        folder: ``quantized_checkpoints_path``.
        exclusions: ``modules_to_not_convert``.

    Raises:
        CheckpointError: The folder was made from another source or with other settings, or is
            damaged, or the source is malformed.
    """
    from nxdi_expertscale.checkpoint import quantize_checkpoint

    while not _is_finished(source, folder, exclusions):
        _logger.info("quantizing %s to %s", source, folder)
        try:
            quantize_checkpoint(source, folder, modules_to_not_convert=exclusions)
        except CheckpointInUseError as error:
            _logger.info("waiting: %s", error)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        except CheckpointError:
            # Another process may have finished it since we looked.
            if not _is_finished(source, folder, exclusions):
                raise
    _logger.info("using the finished checkpoint %s", folder)


def _is_finished(source: Path, folder: Path, exclusions: Sequence[str]) -> bool:
    from nxdi_expertscale.checkpoint import is_untouched, mismatch
    from nxdi_expertscale.checkpoint.write.manifest import MANIFEST

    if not (folder / MANIFEST).is_file():
        return False
    # A host that serves may have the finished folder only, for the model and for the checkpoint.
    reason = None if source.samefile(folder) else mismatch(folder, source, exclusions)
    if reason is not None:
        raise CheckpointError(
            f"{folder}: {reason} (the source is now {source}); name another "
            "quantized_checkpoints_path, or remove the folder to have it made again"
        )
    if not is_untouched(folder):
        raise CheckpointError(
            f"{folder}: files of the checkpoint are missing or have other sizes; see "
            f"'nxdi-expertscale verify {folder}', or remove the folder to have it made again"
        )
    return True
