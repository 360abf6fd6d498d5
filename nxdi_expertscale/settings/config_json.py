"""The flag in the JSON of NxDI's ``InferenceConfig``, as ``to_json_string`` writes it."""

from __future__ import annotations

import json

from nxdi_expertscale.settings.settings import FLAG


def is_on(text: str) -> bool:
    """Whether the flag is on in a config's JSON."""
    neuron_config = json.loads(text).get("neuron_config")
    return isinstance(neuron_config, dict) and neuron_config.get(FLAG) is True
