"""A quantized checkpoint against its original, on a CPU.

Both go over a text side by side with a third: the quantized checkpoint as it would be if the
experts of a layer had to share their mean scale. They are computed in float32, layer by layer and
expert by expert. What is in memory is an expert, the residual streams, and at the end three output
matrices: 4 GB for Qwen3-30B-A3B, whose checkpoints have 61 and 31 GB.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional

from nxdi_expertscale.checkpoint.read.files import CONFIG, Checkpoint
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.evaluation import decoder
from nxdi_expertscale.evaluation.decoder import Architecture, Weights
from nxdi_expertscale.evaluation.stored_weights import StoredWeights, with_averaged_scales
from nxdi_expertscale.evaluation.text import python_documentation, read_text, tokenize
from nxdi_expertscale.families.declaration import MoEFamily

TOKENS = 2048
"""How many tokens of a text are predicted unless another number is asked for."""

LONGEST_SEQUENCE = 512

_TOKENS_AT_ONCE = 128
"""Tokens whose logits are in memory together: 78 MB a model for a vocabulary of 152 k."""

Progress = Callable[[int, int], None]
"""Called with the layers that are done, and all of them, over all models."""


@dataclass(frozen=True)
class Agreement:
    """How far a model with quantized experts is from its original.

    Attributes:
        perplexity: Of the text's next tokens.
        kl_divergence: Of its next-token distributions from the original's, in nats, mean over
            the tokens.
        top1_agreement: Share of the tokens after which both find the same next token likeliest.
        layer_errors: Error of each layer's experts, given what the original gives them: norm of
            the difference as a share of the norm of the original's output. By layer number.
    """

    perplexity: float
    kl_divergence: float
    top1_agreement: float
    layer_errors: dict[int, float]


@dataclass(frozen=True)
class Evaluation:
    """An original, its quantized checkpoint, and what averaged scales would make of that.

    Attributes:
        source: Folder of the original.
        destination: Folder of the quantized checkpoint.
        text: What they were measured on.
        tokens: How many tokens were predicted.
        sequence: Length of the sequences they were predicted in.
        perplexity: The original's.
        expert_wise: The quantized checkpoint as it is.
        averaged: The same with the mean of a layer's scales for each of its experts.
        seconds: How long it took.
    """

    source: Path
    destination: Path
    text: str
    tokens: int
    sequence: int
    perplexity: float
    expert_wise: Agreement
    averaged: Agreement
    seconds: float


def evaluate_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    tokens: int = TOKENS,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure what quantization changed.

    Args:
        src: Folder of the original.
        dst: Folder of the quantized checkpoint that was made from it.
        text: A file in UTF-8; Python's own documentation if none is given.
        tokens: How many tokens of it to predict at most.
        progress: Called with the layers that are done, and all of them.

    Raises:
        CheckpointError: A checkpoint is malformed or not supported, or they do not belong
            together.
        ConfigurationError: The text cannot be used.
    """
    started = time.perf_counter()
    (source, family), (quantized, _) = open_model(src), open_model(dst)
    model = _shared_architecture(source, quantized, family)
    words = python_documentation() if text is None else read_text(Path(text), tokens)
    batch = _sequences(tokenize(words, source.folder, model.vocabulary), source, tokens)
    with (
        StoredWeights(source, family) as original,
        StoredWeights(quantized, family) as expert_wise,
    ):
        _check_names(source, original, model)
        averaged = with_averaged_scales(expert_wise, model)
        found = compare(model, original, [expert_wise, averaged], batch, progress)
    return Evaluation(
        source=source.folder,
        destination=quantized.folder,
        text="Python's documentation" if text is None else str(text),
        tokens=batch[:, 1:].numel(),
        sequence=batch.shape[1] - 1,
        perplexity=found.perplexity,
        expert_wise=found.others[0],
        averaged=found.others[1],
        seconds=time.perf_counter() - started,
    )


def _shared_architecture(
    source: Checkpoint, quantized: Checkpoint, family: MoEFamily
) -> Architecture:
    of_source, of_quantized = (
        decoder.read_architecture(checkpoint.config, family, str(checkpoint.folder / CONFIG))
        for checkpoint in (source, quantized)
    )
    if of_source != of_quantized:
        raise CheckpointError(
            f"{quantized.folder / CONFIG}: describes another model than {source.folder / CONFIG}; "
            "name a checkpoint and what quantize made from it"
        )
    return of_source


def _check_names(source: Checkpoint, weights: StoredWeights, model: Architecture) -> None:
    unknown = sorted(weights.names - set(model.shapes()) - {decoder.LM_HEAD})
    if unknown:
        raise CheckpointError(
            f"{source.folder}: {unknown[0]}: is a weight that the reference on a CPU does not "
            "know, so it cannot compute this model"
        )


def _sequences(tokens: torch.Tensor, source: Checkpoint, wanted: int) -> torch.Tensor:
    """Cut tokens into sequences that share no token to be predicted, ``[batch, length + 1]``."""
    limit = decoder.longest_context(source.config, str(source.folder / CONFIG))
    available = min(wanted, tokens.numel() - 1)
    length = min(LONGEST_SEQUENCE, limit, available)
    if length < 1:
        raise CheckpointError(
            f"{source.folder}: its tokenizer makes {tokens.numel()} tokens of the text, too few "
            "to predict any; give a longer text"
        )
    return tokens[: available // length * length + 1].unfold(0, length + 1, length)


@dataclass(frozen=True)
class Comparison:
    """An original's perplexity, and how far each of the other models is from it."""

    perplexity: float
    others: Sequence[Agreement]


@dataclass
class _Stream:
    """One model on its way through the layers."""

    weights: Weights
    hidden: torch.Tensor
    errors: dict[int, float] = field(default_factory=dict)


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
        batch: Tokens, ``[sequences, length + 1]``; all but the first of each are predicted.
        progress: Called with the layers that are done, and all of them.
    """
    inputs, targets = batch[:, :-1], batch[:, 1:].flatten()
    first, *rest = (
        _Stream(weights, decoder.embed(inputs, weights)) for weights in (original, *others)
    )
    total = model.layers * (1 + len(rest))
    for layer in range(model.layers):
        given, expected = _advance(first, layer, model)
        for number, stream in enumerate(rest):
            _advance(stream, layer, model, given, expected)
            if progress is not None:
                progress(layer * (1 + len(rest)) + number + 2, total)
    return _compare_predictions(model, first, rest, targets)


def _advance(
    stream: _Stream,
    layer: int,
    model: Architecture,
    given: torch.Tensor | None = None,
    expected: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a model through a layer, and its experts over the original's inputs beside its own.

    Both at once, because reading and dequantizing the experts is most of the work.

    Returns:
        What the experts were given, and what they made of it.
    """
    hidden = decoder.attention(stream.hidden, stream.weights, layer, model)
    own = decoder.feed_forward_input(hidden, stream.weights, layer, model)
    both = own if given is None else torch.cat([own, given])
    outputs = decoder.feed_forward(both, stream.weights, layer, model)
    stream.hidden = hidden + outputs[: own.shape[0]]
    if expected is not None and layer not in model.dense_layers:
        difference = outputs[own.shape[0] :] - expected
        stream.errors[layer] = float(difference.norm() / expected.norm())
    return own, outputs[: own.shape[0]]


@dataclass
class _Sums:
    """Sums over tokens."""

    loss: float = 0.0
    divergence: float = 0.0
    agreeing: int = 0


def _compare_predictions(
    model: Architecture, first: _Stream, rest: Sequence[_Stream], targets: torch.Tensor
) -> Comparison:
    heads = [_Held(stream.weights) for stream in (first, *rest)]
    hidden = [stream.hidden.flatten(0, 1) for stream in (first, *rest)]
    sums = [_Sums() for _ in heads]
    for start in range(0, targets.numel(), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        expected: torch.Tensor | None = None
        for head, states, total in zip(heads, hidden, sums, strict=True):
            logs = decoder.logits(states[part], head, model).log_softmax(dim=-1)
            if expected is None:
                expected = logs
            total.loss += float(functional.nll_loss(logs, targets[part], reduction="sum"))
            divergence = functional.kl_div(logs, expected, reduction="sum", log_target=True)
            total.divergence += float(divergence)
            total.agreeing += int((logs.argmax(-1) == expected.argmax(-1)).sum())
    count = targets.numel()
    return Comparison(
        perplexity=_perplexity(sums[0], count),
        others=[
            Agreement(
                perplexity=_perplexity(total, count),
                kl_divergence=total.divergence / count,
                top1_agreement=total.agreeing / count,
                layer_errors=stream.errors,
            )
            for total, stream in zip(sums[1:], rest, strict=True)
        ],
    )


def _perplexity(total: _Sums, count: int) -> float:
    return float(torch.tensor(total.loss / count).exp())


class _Held:
    """Weights that are read once and kept."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._kept: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        if name not in self._kept:
            self._kept[name] = self._weights(name)
        return self._kept[name]
