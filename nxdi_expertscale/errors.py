"""What this package raises. Every message names the file, tensor or setting, and what to do."""

from __future__ import annotations


class ExpertScaleError(Exception):
    """Base class of every error that this package raises on purpose.

    None is a ``ValueError`` or a ``RuntimeError`` as well: callers catch those to go on in another
    way. vLLM-Neuron compiles anew after a ``ValueError`` (``_load_weights_common`` of its
    ``worker/neuronx_distributed_model_loader.py``), and a refusal would be a line in its log.
    """


class ConfigurationError(ExpertScaleError):
    """A setting, or a combination of settings, that cannot give a right model."""


class CheckpointError(ExpertScaleError):
    """A checkpoint, on disk or as a state dict, that is malformed or not supported."""


class CheckpointInUseError(CheckpointError):
    """Another process is writing the checkpoint."""


class IncompatibleUpstreamError(ExpertScaleError):
    """The feature is asked for, and the installed NxDI is not one that can be patched for it."""


def damaged(where: object, what: str) -> CheckpointError:
    """The error for a file that is not what was published: to be downloaded again.

    Args:
        where: The file, and the tensor or setting in it.
        what: What is wrong with it, as in ``"has no weight_map"``.
    """
    return CheckpointError(f"{where}: {what}; download it again")


def incomplete(where: object, what: str) -> CheckpointError:
    """The error for a checkpoint that lacks a part: to be downloaded again, completely.

    Args:
        where: The folder, file or tensor.
        what: What is missing.
    """
    return CheckpointError(f"{where}: {what}; download the checkpoint again, completely")


def one_line(error: BaseException) -> str:
    """An error as one line: its type and its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())
