"""The settings that make NxDI load a finished folder as it was made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.checkpoint.upstream_limits import warn_of_limits
from nxdi_expertscale.checkpoint.write.manifest import read_manifest
from nxdi_expertscale.checkpoint.write.plan import effective_exclusions
from nxdi_expertscale.families.exclusions import expand_exclusions


@dataclass(frozen=True)
class NeuronSettings:
    """Settings for a finished folder.

    Attributes:
        neuron_config: Keywords of NxDI's ``MoENeuronConfig``.
        override_neuron_config: Value of the same name for vLLM-Neuron
            (``--additional-config`` or ``--override-neuron-config``), which sets parallelism and
            lengths from vLLM's own arguments.
    """

    neuron_config: dict[str, Any]
    override_neuron_config: dict[str, Any]


def neuron_settings(
    folder: str | os.PathLike[str],
    *,
    tp_degree: int | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
) -> NeuronSettings:
    """Settings with which NxDI and vLLM-Neuron load a folder that ``quantize`` finished.

    ``quantization_type`` and ``quantization_dtype`` are among them because NxDI's own defaults
    are others (``models/config.py``: ``per_tensor_symmetric`` and ``int8``).

    Args:
        folder: The folder.
        tp_degree: Tensor parallel degree, for ``MoENeuronConfig``.
        batch_size: Batch size, for ``MoENeuronConfig``.
        seq_len: Length of the longest sequence, in tokens, for ``MoENeuronConfig``.

    Raises:
        CheckpointError: The folder was not made by ``quantize``, or is damaged.

    Example:
        >>> settings = neuron_settings("Qwen3-30B-A3B-FP8", tp_degree=4, batch_size=1, seq_len=2048)
        >>> MoENeuronConfig(**settings.neuron_config)
    """
    manifest = read_manifest(folder)
    model = open_model(folder)
    warn_of_limits(model, seq_len)
    exclusions = effective_exclusions(model, manifest.modules_to_not_convert)
    quantization: dict[str, Any] = {
        "quantized": True,
        "quantized_checkpoints_path": str(model.folder.path),
        "quantization_type": "per_channel_symmetric",
        "quantization_dtype": "f8e4m3",
        "expert_wise_scale": True,
        "modules_to_not_convert": list(
            expand_exclusions(exclusions, model.config.num_hidden_layers, model.family)
        ),
    }
    sizes = {"tp_degree": tp_degree, "batch_size": batch_size, "seq_len": seq_len}
    given = {name: value for name, value in sizes.items() if value is not None}
    return NeuronSettings({**given, **quantization}, quantization)
