"""A quantized checkpoint against its original, on a CPU.

Both go over a text side by side with a third: the quantized checkpoint as it would be if the
experts of a layer had to share their mean scale. They are computed in float32, and need 4 GB for
Qwen3-30B-A3B, whose checkpoints have 61 and 31 GB.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nxdi_expertscale.checkpoint.read.files import CONFIG
from nxdi_expertscale.checkpoint.read.model import Model, open_model
from nxdi_expertscale.display.progress import Progress, showing
from nxdi_expertscale.display.results import Shown, Table
from nxdi_expertscale.errors import CheckpointError, damaged, incomplete
from nxdi_expertscale.evaluation.architecture import (
    LM_HEAD,
    Architecture,
    context_length,
    derive_architecture,
)
from nxdi_expertscale.sources.locate import open_source
from nxdi_expertscale.sources.source import Source

if TYPE_CHECKING:
    import torch

    from nxdi_expertscale.evaluation.comparison import Metrics

TOKENS = 2048
"""How many tokens of a text are predicted unless another number is asked for."""

LONGEST_SEQUENCE = 512


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """An original, its quantized checkpoint, and what averaged scales would make of that.

    Attributes:
        source: Folder of the original, or its address.
        destination: Folder of the quantized checkpoint, or its address.
        text: What they were measured on.
        tokens: How many tokens were predicted.
        sequence: Length of the sequences they were predicted in.
        perplexity: The original's.
        expert_wise: The quantized checkpoint as it is.
        averaged: The same with the mean of a layer's scales for each of its experts.
        seconds: How long it took.
    """

    source: Path | str
    destination: Path | str
    text: str
    tokens: int
    sequence: int
    perplexity: float
    expert_wise: Metrics
    averaged: Metrics
    seconds: float

    def kinds(self) -> dict[str, Metrics]:
        """What was measured with each kind of scales, by the name that people read."""
        return {"one per expert": self.expert_wise, "one, averaged": self.averaged}

    def facts(self) -> Mapping[str, str]:
        """What was compared, and on what."""
        return {
            "original": str(self.source),
            "checkpoint": str(self.destination),
            "text": f"{self.tokens} tokens of {self.text}, {self.sequence} at a time",
            "KL from the original": f"{self.expert_wise.kl_divergence:.2g} nats, "
            f"{self.averaged.kl_divergence:.2g} with averaged scales",
            "time": f"{self.seconds:.0f} s",
        }

    def tables(self) -> Sequence[Table]:
        """The original beside the quantized checkpoint with each kind of scales."""
        return [
            Table(
                "What quantization changes",
                ("FP8 scales", "perplexity", "KL, nats", "same top-1", "experts' error"),
                (
                    ("none (original)", f"{self.perplexity:.4g}", "", "", ""),
                    *(self._row(name, measured) for name, measured in self.kinds().items()),
                ),
            )
        ]

    def _row(self, name: str, measured: Metrics) -> tuple[str, ...]:
        change = measured.perplexity / self.perplexity - 1
        errors = measured.layer_errors.values()
        return (
            name,
            f"{measured.perplexity:.4g} ({change:+.2%})",
            f"{measured.kl_divergence:.2g}",
            f"{measured.top1_agreement:.1%}",
            f"{100 * min(errors):.3g}% to {100 * max(errors):.3g}%",
        )


def evaluate_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    tokens: int = TOKENS,
    spool: Path | None = None,
    progress: Progress | bool = True,
) -> Evaluation:
    """Measure what quantization changed.

    Args:
        src: Folder of the original.
        dst: Folder of the quantized checkpoint that was made from it.
        text: A file in UTF-8; Python's own documentation if none is given.
        tokens: How many tokens of it to predict at most.
        spool: Folder for what is read of a checkpoint that is not on this host.
        progress: Called with the layers that are done, and all of them, over all three models. By
            default a bar is shown in a terminal or a notebook; False shows none.

    Raises:
        CheckpointError: A checkpoint is malformed or not supported, or they do not belong
            together.
        ConfigurationError: The text cannot be used.

    Example:
        >>> found = evaluate_checkpoint("Qwen3-30B-A3B", "Qwen3-30B-A3B-FP8")
        >>> found.expert_wise.kl_divergence, found.averaged.kl_divergence
    """
    with (
        open_source(src, spool=spool) as original,
        open_source(dst, spool=spool) as made,
        showing(progress, "evaluating", in_bytes=False) as report,
    ):
        return _evaluate(original, made, text, tokens, report)


def _evaluate(
    src: Source,
    dst: Source,
    text: str | os.PathLike[str] | None,
    tokens: int,
    progress: Progress | None,
) -> Evaluation:
    started = time.perf_counter()
    source, quantized = open_model(src), open_model(dst)
    architecture = _shared_architecture(source, quantized)
    for model in (source, quantized):
        _check_weights(model, architecture)
    # Torch is imported for the values; what is wrong with the folders is told before.
    from nxdi_expertscale.evaluation.comparison import compare
    from nxdi_expertscale.evaluation.stored_weights import StoredWeights, with_averaged_scales
    from nxdi_expertscale.evaluation.text import python_documentation, read_text, tokenize

    content = python_documentation(tokens) if text is None else read_text(Path(text), tokens)
    # One more than is predicted: the first is given.
    token_ids = tokenize(content, source.folder, architecture.vocab_size, tokens + 1)
    batch = _sequences(token_ids, source, tokens)
    with StoredWeights(source) as original, StoredWeights(quantized) as expert_wise:
        averaged = with_averaged_scales(expert_wise)
        found = compare(architecture, original, [expert_wise, averaged], batch, progress)
    if not math.isfinite(found.perplexity):
        raise damaged(
            source.folder.path,
            f"its weights predict nothing that can be measured: the perplexity is "
            f"{found.perplexity}",
        )
    return Evaluation(
        source=source.folder.path,
        destination=quantized.folder.path,
        text="Python's documentation" if text is None else str(text),
        tokens=batch[:, 1:].numel(),
        sequence=batch.shape[1] - 1,
        perplexity=found.perplexity,
        expert_wise=found.others[0],
        averaged=found.others[1],
        seconds=time.perf_counter() - started,
    )


def _shared_architecture(source: Model, quantized: Model) -> Architecture:
    of_source, of_quantized = (
        derive_architecture(model.config, model.family) for model in (source, quantized)
    )
    if of_source != of_quantized:
        raise CheckpointError(
            f"{quantized.config.where}: describes another model than {source.config.where}; name a "
            "checkpoint and what quantize made from it"
        )
    return of_source


def _check_weights(model: Model, architecture: Architecture) -> None:
    """Check that a model has every weight that the decoder takes, and no other."""
    shapes = {weight.name.removeprefix("model."): weight.tensor.shape for weight in model.weights}
    for name, shape in architecture.shapes():
        found = shapes.pop(name, None)
        if found is None:
            raise incomplete(f"{model.folder.path}: {name}", "is missing")
        if found != shape:
            raise CheckpointError(
                f"{model.folder.path}: {name}: has shape {list(found)}, and {CONFIG} says "
                f"{list(shape)}; one of them is another model's"
            )
    unknown = sorted(shapes.keys() - {LM_HEAD})
    if unknown:
        raise CheckpointError(
            f"{model.folder.path}: {unknown[0]}: is a weight that the decoder on a CPU does not "
            "know, so it cannot compute this model"
        )


def _sequences(token_ids: torch.Tensor, source: Model, wanted: int) -> torch.Tensor:
    """Cut tokens into sequences that share no token to be predicted, ``[batch, length + 1]``."""
    available = min(wanted, token_ids.numel() - 1)
    length = min(LONGEST_SEQUENCE, context_length(source.config), available)
    if length < 1:
        raise CheckpointError(
            f"{source.folder.path}: its tokenizer makes {token_ids.numel()} tokens of the text, "
            "too few to predict any; give a longer text"
        )
    return token_ids[: available // length * length + 1].unfold(0, length + 1, length)
