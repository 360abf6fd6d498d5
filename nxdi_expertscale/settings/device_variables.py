"""The environment variables without which a Trainium device does not compute in FP8.

Upstream: NxDI's ``inference_demo.py`` (``create_neuron_config``) sets them; vLLM-Neuron does not.
"""

from __future__ import annotations

import logging
import os

VARIABLES = ("XLA_HANDLE_SPECIAL_SCALAR", "UNSAFE_FP8FNCAST")
ON = "1"

_logger = logging.getLogger("nxdi_expertscale")


def set_variables() -> None:
    """Set those that are not set, for this process and its children.

    One that is set to something else is left as it is, with a warning.
    """
    unset = [name for name in VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, ON))
    if unset:
        _logger.info("set %s for FP8", ", ".join(f"{name}={ON}" for name in unset))
    for conflict in find_conflicts():
        _logger.warning("%s", conflict)


def find_conflicts() -> list[str]:
    """One line for each variable that the environment sets to something else."""
    return [
        f"{name}={os.environ[name]!r} in the environment: FP8 on the device needs {name}={ON}"
        for name in VARIABLES
        if os.environ.get(name, ON) != ON
    ]
