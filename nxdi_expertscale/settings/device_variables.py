"""The environment variables without which a Trainium device does not compute in FP8.

Upstream: NxDI's ``inference_demo.py`` (``create_neuron_config``) sets them; vLLM-Neuron does not.
"""

from __future__ import annotations

import logging
import os

SWITCHES = ("XLA_HANDLE_SPECIAL_SCALAR", "UNSAFE_FP8FNCAST")
ON = "1"

_logger = logging.getLogger("nxdi_expertscale")


def turn_on() -> None:
    """Set the switches for this process and its children, those that are not set.

    One that is set to something else is left as it is, with a warning.
    """
    unset = [name for name in SWITCHES if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, ON))
    if unset:
        _logger.info("set %s for FP8", ", ".join(f"{name}={ON}" for name in unset))
    for contradiction in contradictions():
        _logger.warning("%s", contradiction)


def contradictions() -> list[str]:
    """One line for each switch that the environment sets to something else."""
    return [
        f"{name}={os.environ[name]!r} in the environment: FP8 on the device needs {name}={ON}"
        for name in SWITCHES
        if os.environ.get(name, ON) != ON
    ]
