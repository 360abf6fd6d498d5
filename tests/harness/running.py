"""A model's way through NxDI on a CPU: quantize, convert, build, shard, load, run.

The steps are those that NxDI takes on the device, called one by one because its own CPU mode
(``to_cpu``) leaves out the quantization of the modules.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from neuronx_distributed_inference.models.config import MoENeuronConfig
from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

from nxdi_expertscale.testing import running
from nxdi_expertscale.testing.running import LoadedModel
from nxdi_expertscale.testing.whole_model import (
    WITHIN_FP8,
    first_calls,
    relative_error,
    repeat,
)
from tests.harness import models, whole_model

FP8: dict[str, Any] = {
    "quantized": True,
    "quantization_type": "per_channel_symmetric",
    "quantization_dtype": "f8e4m3",
}
"""What a user writes for FP8; NxDI's own defaults are int8 with one scale for a tensor."""

ROUTER = "mlp.gate"
"""What has to be in ``modules_to_not_convert``, or the router is quantized too."""

_ROUNDING = 1e-4

_APPLICATIONS = {
    "qwen3": ("qwen3.modeling_qwen3", "NeuronQwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe.modeling_qwen3_moe", "NeuronQwen3MoeForCausalLM"),
    "mixtral": ("mixtral.modeling_mixtral", "NeuronMixtralForCausalLM"),
    "llama4": ("llama4.modeling_llama4_text", "NeuronLlama4TextForCausalLM"),
}
"""For each ``model_type``, the module under NxDI's ``models`` and its application."""

_FEED_FORWARD = ("mlp", "block_sparse_moe", "feed_forward")
"""Names of a layer's feed-forward part, in Hugging Face's models and in NxDI's."""

OTHER_MODELS = ("vision_model.", "multi_modal_projector.")
"""What a checkpoint holds beside the language model."""

_NOT_IN_CHECKPOINTS = (
    "kv_mgr.",
    "hidden_state_rolling_buffer.",
    # The ranks of attention, which releases before 0.7 do not write.
    ".rank_util.rank",
    # A quantized weight's second name in ahead-of-time mode; the same parameter.
    ".master_weight",
    # What fused token generation has under a second name; the same parameters.
    ".moe_fused_tkg.",
    ".moe.rmsnorm.",
    ".mlp.rmsnorm.",
)


def application_cls(checkpoint: Path) -> Any:
    """NxDI's application of a Hugging Face model."""
    config = json.loads((checkpoint / "config.json").read_text())
    module, name = _APPLICATIONS[config["model_type"]]
    models_of_nxdi = "neuronx_distributed_inference.models"
    return getattr(importlib.import_module(f"{models_of_nxdi}.{module}"), name)


def inference_config(checkpoint: Path, **settings: Any) -> Any:
    """NxDI's config of a model.

    Args:
        checkpoint: Folder of the Hugging Face model.
        settings: Keywords of ``MoENeuronConfig``, beside those that every test needs.
    """
    neuron_config = MoENeuronConfig(
        **{
            "batch_size": 1,
            "seq_len": models.SEQUENCE,
            "max_context_length": models.SEQUENCE,
            "torch_dtype": torch.float32,
            **settings,
        }
    )
    config = application_cls(checkpoint).get_config_cls()(
        neuron_config, load_config=load_pretrained_config(str(checkpoint))
    )
    return getattr(config, "text_config", config)


def configs_of_a_pair(checkpoint: Path, **settings: Any) -> tuple[Any, Any]:
    """The configs of a target for fused speculation and of a draft of its kind.

    Args:
        checkpoint: Folder of the Hugging Face model.
        settings: Further keywords of ``MoENeuronConfig``.
    """
    target = inference_config(
        checkpoint,
        **settings,
        enable_fused_speculation=True,
        speculation_length=2,
        on_device_sampling_config={"top_k": 1},
    )
    draft = copy.deepcopy(target)
    draft.neuron_config.speculation_length = 0
    draft.neuron_config.enable_fused_speculation = False
    return target, draft


def quantize(
    checkpoint: Path, folder: Path, *, not_converted: Sequence[str] = (ROUTER,), **settings: Any
) -> dict[str, Any]:
    """Quantize a model with NxDI's own step.

    Args:
        checkpoint: Folder of the Hugging Face model.
        folder: Where the quantized state dict goes; made if it is not there.
        not_converted: What stays in full precision.
        settings: Further keywords of ``MoENeuronConfig``.

    Returns:
        The keywords of ``MoENeuronConfig`` with which the result is loaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    quantized = {
        **FP8,
        "quantized_checkpoints_path": str(folder),
        "modules_to_not_convert": list(not_converted),
        **settings,
    }
    config = inference_config(checkpoint, **quantized)
    application_cls(checkpoint).save_quantized_state_dict(str(checkpoint), config)
    return quantized


@dataclass(frozen=True)
class _Block:
    """An MoE block of Hugging Face's model as it was called, ``[1, tokens, hidden]``."""

    layer: int
    given: torch.Tensor
    expected: torch.Tensor


def convert(checkpoint: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """A model's state dict as NxDI converts it, whole.

    Args:
        checkpoint: Folder of the Hugging Face model.
        settings: Keywords of ``MoENeuronConfig``.
    """
    config = inference_config(checkpoint, **settings)
    application = application_cls(checkpoint)(str(checkpoint), config)
    state_dict: dict[str, torch.Tensor] = application.checkpoint_loader_fn()
    return state_dict


def load(checkpoint: Path, *, rank: int = 0, **settings: Any) -> LoadedModel:
    """Convert, build, shard and load a model.

    Args:
        checkpoint: Folder of the Hugging Face model.
        rank: Which of the ``tp_degree`` ranks this process is.
        settings: Keywords of ``MoENeuronConfig``.

    Raises:
        AssertionError: The state dict and the module do not have the same tensors.
    """
    config = inference_config(checkpoint, **settings)
    application = application_cls(checkpoint)(str(checkpoint), config)
    return load_application(application, rank=rank)


def load_application(application: Any, *, rank: int = 0) -> LoadedModel:
    """Convert, build, shard and load what an application holds; see :func:`load`."""
    loaded = running.load_application(application, rank=rank)
    missing = [name for name in loaded.missing if not is_state(name)]
    unexpected = [name for name in loaded.unexpected if not name.startswith(OTHER_MODELS)]
    if missing or unexpected:
        raise AssertionError(f"missing: {missing}, unexpected: {unexpected}")
    return loaded


def moe_output(loaded: LoadedModel, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
    """Output of a layer's MoE block for an input ``[1, tokens, hidden]``."""
    with torch.no_grad():
        output: torch.Tensor = feed_forward(loaded.module.layers[layer])(hidden_states)[0]
    return output.view_as(hidden_states)


def is_state(name: str) -> bool:
    """Whether a parameter of NxDI's module has no tensor of its own in a checkpoint."""
    return any(part in name for part in _NOT_IN_CHECKPOINTS)


def part(module: Any) -> LoadedModel:
    """One of the models of a draft and its target, which were loaded together.

    It gives logits from now on, instead of tokens that are sampled on the device.
    """
    module.on_device_sampling = False
    return LoadedModel(module, {}, (), ())


def different_tensors(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> list[str]:
    """Names of the tensors that are not the same in both, to the last bit."""
    return sorted(
        name
        for name in actual.keys() | expected.keys()
        if name not in actual
        or name not in expected
        or not _same_bits(actual[name], expected[name])
    )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def feed_forward(layer: Any) -> Any:
    """The feed-forward part of a layer, of NxDI's or of Hugging Face's."""
    return next(getattr(layer, name) for name in _FEED_FORWARD if hasattr(layer, name))


def moe_errors(checkpoint: Path, loaded: LoadedModel) -> list[float]:
    """Error of each MoE block's output against Hugging Face, given the same input.

    Args:
        checkpoint: Folder of the Hugging Face model, the reference.
        loaded: The model as NxDI runs it.
    """
    _, blocks = _run_huggingface(checkpoint)
    return _moe_errors(loaded, blocks)


def _run_huggingface(checkpoint: Path) -> tuple[torch.Tensor, list[_Block]]:
    """The last token's logits ``[1, vocab]``, and each MoE block as it was called."""
    reference = models.load(checkpoint)
    blocks: list[_Block] = []
    for number, layer in enumerate(reference.model.layers):
        block = feed_forward(layer)
        if not hasattr(block, "experts"):
            continue

        def keep(_: Any, inputs: Any, outputs: Any, number: int = number) -> None:
            blocks.append(_Block(number, inputs[0], outputs[0].view_as(inputs[0])))

        block.register_forward_hook(keep)
    with torch.no_grad():
        logits: torch.Tensor = reference(models.prompt()).logits[:, -1]
    return logits, blocks


def _moe_errors(loaded: LoadedModel, blocks: Sequence[_Block]) -> list[float]:
    return [
        relative_error(moe_output(loaded, block.layer, block.given), block.expected)
        for block in blocks
    ]


def compare(
    checkpoint: Path,
    loaded: LoadedModel,
    *,
    rank: int = 0,
    reference: LoadedModel | None = None,
    **settings: Any,
) -> whole_model.Comparison:
    """How far a whole model is off: every parameter, attention, MoE blocks, logits.

    Args:
        checkpoint: Folder of the Hugging Face model, the reference.
        loaded: The model as NxDI runs it, on one rank.
        rank: Which one, of several that call this together.
        reference: The same model unquantized, if it cannot be loaded here.
        settings: The keywords of ``MoENeuronConfig`` with which it is loaded here, unquantized.

    Raises:
        AssertionError: The models have other parameters, or NxDI's unquantized one is not
            Hugging Face's.
    """
    expected, blocks = _run_huggingface(checkpoint)
    reference = reference or load(checkpoint, rank=rank, **settings)
    prompt = models.prompt()
    rounding = relative_error(reference.logits(prompt), expected)
    assert rounding < _ROUNDING, f"NxDI's unquantized model is {rounding:.1e} off"
    paths = [f"layers.{number}.self_attn" for number in range(len(loaded.module.layers))]
    with first_calls(loaded.module, paths) as calls:
        logits = loaded.logits(prompt)
    attention = [
        relative_error(
            calls[path].output, repeat(reference.module.get_submodule(path), calls[path])
        )
        for path in paths
    ]
    return whole_model.Comparison(
        parameter_errors(loaded, reference),
        tuple(attention),
        tuple(_moe_errors(loaded, blocks)),
        relative_error(logits, expected),
    )


def parameter_errors(loaded: LoadedModel, unquantized: LoadedModel) -> dict[str, float]:
    """The error of each parameter, dequantized, against the same model unquantized."""
    return whole_model.parameter_errors(
        *(
            {name: value for name, value in model.module.state_dict().items() if not is_state(name)}
            for model in (loaded, unquantized)
        )
    )


def assert_right(
    checkpoint: Path,
    loaded: LoadedModel,
    *,
    within: float = WITHIN_FP8,
    **settings: Any,
) -> whole_model.Comparison:
    """Assert that nothing of a model is further off than that; see :func:`compare`."""
    found = compare(checkpoint, loaded, **settings)
    assert found.beyond(within) == {}
    return found
