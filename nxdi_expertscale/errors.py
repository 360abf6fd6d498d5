"""What this package raises. Every message names the file, tensor or setting, and what to do."""


class ExpertScaleError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigurationError(ExpertScaleError, ValueError):
    """A setting, or a combination of settings, that cannot give a right model."""


class CheckpointError(ExpertScaleError, ValueError):
    """A checkpoint, on disk or as a state dict, that is malformed or not supported."""


class CheckpointInUseError(CheckpointError):
    """Another process is writing the checkpoint."""


class IncompatibleUpstreamError(ExpertScaleError, RuntimeError):
    """The feature is asked for, and the installed NxDI is not one that can be patched for it."""
