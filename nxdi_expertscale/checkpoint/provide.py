"""See to it that the folder that NxDI is told to load is the FP8 checkpoint of its source."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from nxdi_expertscale.checkpoint.finished import check_finished, is_finished
from nxdi_expertscale.checkpoint.origin import remembered_mismatch
from nxdi_expertscale.checkpoint.quantize import quantize_checkpoint
from nxdi_expertscale.checkpoint.read.files import INDEX, SINGLE_FILE
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.checkpoint.write.plan import excluded_modules
from nxdi_expertscale.errors import CheckpointError, CheckpointInUseError, ConfigurationError
from nxdi_expertscale.families.declaration import MoEFamily

QUANTIZED_DTYPE = "f8e4m3"
"""NxDI's name, ``quantization_dtype``, for the dtype that ``quantize`` makes."""

POLL_SECONDS = 2.0
"""How long to wait between looks at a folder that another process is making."""

_logger = logging.getLogger("nxdi_expertscale")


def find_obstacle(source: Path, quantization_dtype: str, family: MoEFamily | None) -> str | None:
    """Find out why ``quantize`` cannot make the checkpoint that NxDI asks for; None if it can.

    Args:
        source: What NxDI calls the model's path.
        quantization_dtype: NxDI's setting, in lower case.
        family: The model's family; None where it has no experts, or is not known.
    """
    if family is None:
        return "it is no mixture-of-experts model of a known family"
    if quantization_dtype != QUANTIZED_DTYPE:
        return f"quantization_dtype is {quantization_dtype!r}, not {QUANTIZED_DTYPE!r}"
    if not source.is_dir():
        return f"{source} is no local folder"
    if not any((source / name).exists() for name in (SINGLE_FILE, INDEX)):
        return f"{source} has no safetensors files"
    return None


def prepare_for_upstream(source: Path, folder: Path, obstacle: str) -> None:
    """Make a folder ready for NxDI's own quantization step.

    Args:
        source: What NxDI calls the model's path.
        folder: ``quantized_checkpoints_path``; made if it is not there.
        obstacle: What :func:`find_obstacle` found.

    Raises:
        CheckpointError: NxDI would write over the source, or over a folder of ours.
    """
    check_not_overwritten(source, folder, obstacle)
    _logger.warning("the checkpoint is quantized by NxDI itself, in memory: %s", obstacle)
    # NxDI writes safetensors to a folder that exists, and a pickle to any other path.
    if not folder.exists():
        folder.mkdir(parents=True)


def check_not_overwritten(source: Path, folder: Path, reason: str) -> None:
    """Check that NxDI's own step does not write where something is that it would destroy.

    It writes a checkpoint of its own to ``quantized_checkpoints_path``, and Hugging Face's library
    then removes the shards and the index that were there.

    Args:
        source: What NxDI calls the model's path.
        folder: ``quantized_checkpoints_path``.
        reason: Why it is NxDI's step that runs.

    Raises:
        CheckpointError: The folder is the source, or was made by ``quantize``.
    """
    if folder.exists() and source.exists() and folder.samefile(source):
        raise CheckpointError(
            f"{folder}: is the model itself, and NxDI would write its quantized weights over it "
            f"({reason}); name another quantized_checkpoints_path"
        )
    if is_finished(folder):
        raise CheckpointError(
            f"{folder}: was made by nxdi-expertscale quantize, and NxDI would write over it, "
            f"because {reason}; name another quantized_checkpoints_path"
        )


def provide_checkpoint(
    source: Path,
    folder: Path,
    modules_to_not_convert: Sequence[str],
    *,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Use a folder that is the finished FP8 checkpoint of a source, or make it.

    While another process is making it, this one waits.

    Args:
        source: The original checkpoint, or the finished folder itself.
        folder: ``quantized_checkpoints_path``.
        modules_to_not_convert: Modules that stay in full precision.
        poll_seconds: How long to wait between looks at a folder that is being made.

    Raises:
        CheckpointError: The folder was made from another source or with other settings, or is
            damaged, or the source is malformed.
        ConfigurationError: An exclusion is a part of no module's name, or of what NxDI fuses, or
            others are quantized in the folder.
    """
    while not is_provided(source, folder, modules_to_not_convert):
        _logger.info("quantizing %s to %s", source, folder)
        try:
            quantize_checkpoint(
                source, folder, modules_to_not_convert=modules_to_not_convert, progress=False
            )
        except CheckpointInUseError as error:
            _logger.info("waiting: %s", error)
            time.sleep(poll_seconds)
        except CheckpointError:
            # Another process may have finished it since we looked.
            if not is_provided(source, folder, modules_to_not_convert):
                raise
    _logger.info("using the finished checkpoint %s", folder)


def is_provided(source: Path, folder: Path, modules_to_not_convert: Sequence[str]) -> bool:
    """Whether a folder is a finished checkpoint, which then has to be whole and of the source.

    Raises:
        CheckpointError: It was changed, or made from another source or with other settings.
        ConfigurationError: Other modules of it are quantized than the exclusions say.
    """
    if not is_finished(folder):
        return False
    check_finished(folder)
    # A host that serves may have the finished folder only, for the model and for the checkpoint.
    is_same = source.samefile(folder)
    reason = None if is_same else remembered_mismatch(folder, source, modules_to_not_convert)
    if reason is not None:
        raise CheckpointError(
            f"{folder}: {reason} (the source is now {source}); name another "
            "quantized_checkpoints_path, or remove the folder to have it made again"
        )
    check_exclusions(folder, modules_to_not_convert)
    return True


def check_exclusions(folder: Path, modules_to_not_convert: Sequence[str]) -> None:
    """Check that exclusions name just what is in full precision in a finished folder.

    Raises:
        ConfigurationError: They do not, and NxDI could not load the folder with them.
    """
    finished = open_model(folder)
    excluded = excluded_modules(finished, modules_to_not_convert)
    for weight in finished.weights:
        is_quantized = weight.scale is not None
        if not weight.can_be_quantized:
            continue
        if is_quantized == (weight.module in excluded):
            found = "quantized" if is_quantized else "in full precision"
            named = "names it" if is_quantized else "does not name it"
            raise ConfigurationError(
                f"{folder}: {weight.module} is {found} there, and modules_to_not_convert {named}; "
                f"write what 'nxdi-expertscale neuron-config {folder}' prints"
            )
