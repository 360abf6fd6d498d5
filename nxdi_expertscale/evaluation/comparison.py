"""Run models over the same tokens side by side, and measure how far they are from the first.

They are computed layer by layer and expert by expert. What is in memory is an expert, the residual
streams, and at the end an output matrix of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from nxdi_expertscale.display.progress import Progress
from nxdi_expertscale.evaluation import decoder
from nxdi_expertscale.evaluation.architecture import Architecture
from nxdi_expertscale.evaluation.decoder import Weights

_TOKENS_AT_ONCE = 128
"""Tokens whose logits are in memory together: 78 MB a model for a vocabulary of 152 k."""


@dataclass(frozen=True)
class Metrics:
    """How far a model with quantized experts is from its original.

    Attributes:
        perplexity: Of the text's next tokens.
        kl_divergence: Of its next-token distributions from the original's, in nats, mean over
            the tokens.
        top1_agreement: Share of the tokens after which both find the same next token likeliest.
        layer_errors: Relative error (Frobenius norm) of the output of each layer's experts, given
            the input that the original gives them. By layer number.
    """

    perplexity: float
    kl_divergence: float
    top1_agreement: float
    layer_errors: dict[int, float] = field(repr=False)


@dataclass(frozen=True)
class Comparison:
    """An original's perplexity, and how far each of the other models is from it."""

    perplexity: float
    others: Sequence[Metrics]


@dataclass
class _Run:
    """One model on its way through the layers.

    Attributes:
        weights: Its weights.
        hidden: Its residual stream, ``[batch, length, hidden]``.
        layer_errors: The error of the layers that it has passed.
    """

    weights: Weights
    hidden: torch.Tensor
    layer_errors: dict[int, float] = field(default_factory=dict)


@torch.inference_mode()
def compare(
    model: Architecture,
    original: Weights,
    others: Sequence[Weights],
    batch: torch.Tensor,
    progress: Progress | None = None,
) -> Comparison:
    """Run models side by side, layer by layer.

    Args:
        model: How all of them compute.
        original: The weights that the others are measured against.
        others: The weights of the other models.
        batch: Tokens, ``[sequences, length + 1]``, ``torch.int64``; all but the first of each
            sequence are predicted.
        progress: Called with the layers that are done, and all of them, over all models.
    """
    inputs, targets = batch[:, :-1], batch[:, 1:].flatten()
    first, *rest = (
        _Run(weights, decoder.embed(inputs, weights)) for weights in (original, *others)
    )
    models = 1 + len(rest)
    for layer in range(model.num_hidden_layers):
        mlp_inputs, mlp_outputs = _advance(first, layer, model)
        for number, run in enumerate(rest):
            _advance(run, layer, model, mlp_inputs, mlp_outputs)
            if progress is not None:
                progress(layer * models + number + 2, model.num_hidden_layers * models)
    return _compare_predictions(model, first, rest, targets)


def _advance(
    run: _Run,
    layer: int,
    model: Architecture,
    original_inputs: torch.Tensor | None = None,
    original_outputs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a model through a layer, and its experts over the original's inputs beside its own.

    Both at once, because reading and dequantizing the experts is most of the work.

    Returns:
        The inputs and the outputs of its experts, each ``[batch, length, hidden]``.
    """
    hidden = decoder.attention(run.hidden, run.weights, layer, model)
    inputs = decoder.normalize_mlp_input(hidden, run.weights, layer, model)
    both = inputs if original_inputs is None else torch.cat([inputs, original_inputs])
    outputs = decoder.mlp(both, run.weights, layer, model)
    run.hidden = hidden + outputs[: inputs.shape[0]]
    if original_outputs is not None and layer not in model.dense_layers:
        difference = outputs[inputs.shape[0] :] - original_outputs
        run.layer_errors[layer] = float(difference.norm() / original_outputs.norm())
    return inputs, outputs[: inputs.shape[0]]


@dataclass
class _Sums:
    """Sums over tokens."""

    loss: float = 0.0
    divergence: float = 0.0
    same_top1: int = 0


def _compare_predictions(
    model: Architecture, first: _Run, rest: Sequence[_Run], targets: torch.Tensor
) -> Comparison:
    weights = [_Cached(run.weights) for run in (first, *rest)]
    hidden = [run.hidden.flatten(0, 1) for run in (first, *rest)]
    sums = [_Sums() for _ in weights]
    for start in range(0, targets.numel(), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        expected: torch.Tensor | None = None
        for own, states, total in zip(weights, hidden, sums, strict=True):
            log_probs = decoder.logits(states[part], own, model).log_softmax(dim=-1)
            if expected is None:
                expected = log_probs
            total.loss += float(functional.nll_loss(log_probs, targets[part], reduction="sum"))
            divergence = functional.kl_div(log_probs, expected, reduction="sum", log_target=True)
            total.divergence += float(divergence)
            total.same_top1 += int((log_probs.argmax(-1) == expected.argmax(-1)).sum())
    count = targets.numel()
    return Comparison(
        perplexity=_perplexity(sums[0], count),
        others=[
            Metrics(
                perplexity=_perplexity(total, count),
                kl_divergence=total.divergence / count,
                top1_agreement=total.same_top1 / count,
                layer_errors=run.layer_errors,
            )
            for total, run in zip(sums[1:], rest, strict=True)
        ],
    )


def _perplexity(total: _Sums, count: int) -> float:
    return float(torch.tensor(total.loss / count).exp())


class _Cached:
    """Weights that are read once and kept."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._kept: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        if name not in self._kept:
            self._kept[name] = self._weights(name)
        return self._kept[name]
