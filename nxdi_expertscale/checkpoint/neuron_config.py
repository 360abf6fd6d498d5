"""The settings that make NxDI load a finished folder as it was made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nxdi_expertscale.checkpoint.read.model import Model, open_model
from nxdi_expertscale.checkpoint.upstream_limits import warn_of_limits
from nxdi_expertscale.checkpoint.write.manifest import read_manifest
from nxdi_expertscale.checkpoint.write.plan import effective_exclusions
from nxdi_expertscale.display.results import Shown
from nxdi_expertscale.errors import ConfigurationError, parameter
from nxdi_expertscale.families.exclusions import expand_exclusions


@dataclass(frozen=True)
class NeuronSettings(Shown):
    """Settings for a finished folder.

    Attributes:
        neuron_config: Keywords of NxDI's ``MoENeuronConfig``.
        override_neuron_config: Value of the same name for vLLM-Neuron
            (``--additional-config`` or ``--override-neuron-config``), which sets parallelism and
            lengths from vLLM's own arguments.
    """

    neuron_config: dict[str, Any]
    override_neuron_config: dict[str, Any]

    def facts(self) -> Mapping[str, str]:
        """The keywords of ``MoENeuronConfig``, as they are written in Python."""
        return {name: repr(value) for name, value in self.neuron_config.items()}


def neuron_settings(
    folder: str | os.PathLike[str],
    *,
    tp_degree: int | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    moe_ep_degree: int | None = None,
) -> NeuronSettings:
    """Settings with which NxDI and vLLM-Neuron load a folder that ``quantize`` finished.

    ``quantization_type`` and ``quantization_dtype`` are among them because NxDI's own defaults
    are others (``models/config.py``: ``per_tensor_symmetric`` and ``int8``).

    Args:
        folder: The folder.
        tp_degree: Tensor parallel degree, for ``MoENeuronConfig``.
        batch_size: Batch size, for ``MoENeuronConfig``.
        seq_len: Length of the longest sequence, in tokens, for ``MoENeuronConfig``.
        moe_ep_degree: Ranks over which a layer's experts are spread, a divisor of ``tp_degree``;
            the rest of it is their tensor parallelism.

    Raises:
        CheckpointError: The folder was not made by ``quantize``, or is damaged.
        ConfigurationError: The experts cannot be spread so.

    Example:
        >>> settings = neuron_settings("Qwen3-30B-A3B-FP8", tp_degree=4, batch_size=1, seq_len=2048)
        >>> MoENeuronConfig(**settings.neuron_config)
    """
    model, settings = read_neuron_settings(
        folder,
        tp_degree=tp_degree,
        batch_size=batch_size,
        seq_len=seq_len,
        moe_ep_degree=moe_ep_degree,
    )
    warn_of_limits(model, seq_len)
    return settings


def read_neuron_settings(
    folder: str | os.PathLike[str],
    *,
    tp_degree: int | None,
    batch_size: int | None,
    seq_len: int | None,
    moe_ep_degree: int | None,
) -> tuple[Model, NeuronSettings]:
    """The finished checkpoint, opened, and :func:`neuron_settings` of it, without a warning."""
    manifest = read_manifest(folder)
    model = open_model(folder)
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
    quantization |= _parallelism(tp_degree, moe_ep_degree, model.config.num_experts)
    sizes = {"tp_degree": tp_degree, "batch_size": batch_size, "seq_len": seq_len}
    given = {name: value for name, value in sizes.items() if value is not None}
    return model, NeuronSettings({**given, **quantization}, quantization)


def _parallelism(tp_degree: int | None, moe_ep_degree: int | None, experts: int) -> dict[str, Any]:
    if moe_ep_degree is None:
        return {}
    if tp_degree is None or tp_degree % moe_ep_degree:
        raise ConfigurationError(
            f"{parameter('moe_ep_degree')}: {moe_ep_degree} spreads the experts over a part of the "
            f"ranks; set {parameter('tp_degree')} to a multiple of {moe_ep_degree} as well"
        )
    if experts % moe_ep_degree:
        raise ConfigurationError(
            f"{parameter('moe_ep_degree')}: {moe_ep_degree} does not divide a layer's {experts} "
            "experts; use one that does"
        )
    # NxDI multiplies the two, and takes 1 for what is not set.
    return {"moe_ep_degree": moe_ep_degree, "moe_tp_degree": tp_degree // moe_ep_degree}
