"""``nxdi-expertscale demo``: a small model from text to figures, in two minutes on any machine."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import filelock

from nxdi_expertscale.checkpoint import quantize_checkpoint, verify_checkpoint
from nxdi_expertscale.display.progress import Progress
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.evaluation import small_model
from nxdi_expertscale.evaluation.evaluate import Evaluation, evaluate_checkpoint
from nxdi_expertscale.sources.user_cache import user_cache
from nxdi_expertscale.version import __version__

CONFIG = small_model.qwen3_moe_config(hidden_size=64, moe_intermediate_size=64)
RECIPE = small_model.Recipe(steps=400)
SPREAD = 16
"""Factor between the experts' magnitudes in the second model."""

TOKENS = 32768
"""How many tokens of the held-out text are predicted."""

HELD_OUT = "held-out.txt"


class Bar(Protocol):
    """Makes a progress bar for a task."""

    def __call__(self, what: str, *, in_bytes: bool) -> AbstractContextManager[Progress]:
        """Make a bar.

        Args:
            what: The work, a word or two.
            in_bytes: Whether amounts are bytes; otherwise they are steps.
        """


@dataclass(frozen=True)
class Demo:
    """What the demo made and found.

    Attributes:
        folder: Where everything is kept.
        trained: Whether the model was trained in this run, rather than in an earlier one.
        unigram_perplexity: Perplexity of the held-out text for a model that only knows how
            frequent each byte is.
        as_trained: The quantized model against the original.
        spread: The same of a model that computes the same as the original, and whose experts lie
            apart in magnitude by :data:`SPREAD`.
    """

    folder: Path
    trained: bool
    unigram_perplexity: float
    as_trained: Evaluation
    spread: Evaluation


def run(bar: Bar) -> Demo:
    """Train a small model, or take that of an earlier run; quantize, verify and measure it.

    Args:
        bar: Makes a progress bar for a task.

    Raises:
        CheckpointError: A fault was found in what was quantized.
    """
    corpus = small_model.python_library()
    folder = user_cache() / f"demo-{_fingerprint(corpus)}"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"), small_model.one_thread():
        trained = not (folder / "model").exists()
        if trained:
            _make_models(folder, corpus, bar)
        return Demo(
            folder=folder,
            trained=trained,
            unigram_perplexity=small_model.unigram_perplexity(corpus),
            as_trained=_measure(folder, "model", bar),
            spread=_measure(folder, "spread", bar),
        )


def _make_models(folder: Path, corpus: small_model.Corpus, bar: Bar) -> None:
    (folder / HELD_OUT).write_text(corpus.held_out, encoding="utf-8")
    unfinished, spread = folder / "unfinished", folder / "spread"
    for new in (unfinished, spread):
        new.mkdir(exist_ok=True)
    with bar("training", in_bytes=False) as progress:
        small_model.make(unfinished, CONFIG, corpus, RECIPE, progress)
    small_model.spread_experts(unfinished, spread, SPREAD)
    # Last, and at once: where this folder is, all that belongs to it is.
    unfinished.replace(folder / "model")


def _measure(folder: Path, name: str, bar: Bar) -> Evaluation:
    model, quantized = folder / name, folder / f"{name}-fp8"
    with bar("quantizing", in_bytes=True) as progress:
        quantize_checkpoint(model, quantized, overwrite=True, progress=progress)
    with bar("verifying", in_bytes=True) as progress:
        faults = verify_checkpoint(quantized, model, progress=progress).faults
    if faults:
        raise CheckpointError(f"{faults[0].where}: {faults[0].what}")
    with bar("evaluating", in_bytes=False) as progress:
        return evaluate_checkpoint(
            model, quantized, text=folder / HELD_OUT, tokens=TOKENS, progress=progress
        )


def _fingerprint(corpus: small_model.Corpus) -> str:
    """Digest of all that the models depend on."""
    recipe = json.dumps([__version__, CONFIG, asdict(RECIPE), SPREAD, corpus.digest])
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]
