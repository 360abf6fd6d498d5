"""What the environment says of the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nxdi_expertscale.diagnostics.findings import Finding, warning
from nxdi_expertscale.settings import device_variables

LOGICAL_NC_VARIABLE = "NEURON_LOGICAL_NC_CONFIG"
"""Physical NeuronCores in a logical one; on trn2 the default is 2."""


def describe_device() -> dict[str, str]:
    """The number of Neuron devices, and the variables that decide how one computes in FP8."""
    devices = len(list(Path("/dev").glob("neuron[0-9]*")))
    return {
        "Neuron devices": str(devices) if devices else "none: compiled models cannot be run here",
        LOGICAL_NC_VARIABLE: os.environ.get(LOGICAL_NC_VARIABLE, "unset"),
        **{
            name: os.environ.get(name, "unset: expert_wise_scale with FP8 sets it")
            for name in device_variables.VARIABLES
        },
    }


def check_device() -> Iterator[Finding]:
    """Check that no variable is set to what FP8, or the blockwise kernel, cannot work with."""
    yield from map(warning, device_variables.find_conflicts())
    cores = os.environ.get(LOGICAL_NC_VARIABLE, "2")
    if cores != "2":
        yield warning(
            f"{LOGICAL_NC_VARIABLE}={cores!r}: expert_wise_scale needs 2 where the blockwise "
            "kernel runs"
        )
