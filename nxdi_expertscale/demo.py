"""``nxdi-expertscale demo``: a small model from text to figures, in two minutes on any machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock

from nxdi_expertscale import small_model
from nxdi_expertscale.checkpoint import quantize_checkpoint, verify_checkpoint
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.evaluation import Evaluation, evaluate_checkpoint

CONFIG = small_model.qwen3_moe_config(hidden_size=64, moe_intermediate_size=64)
RECIPE = small_model.Recipe(steps=300)
TOKENS = 8192
"""How many tokens of the held-out text are predicted."""

HELD_OUT = "held-out.txt"

Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Makes a progress bar for a task."""


@dataclass(frozen=True)
class Demo:
    """What the demo made and found.

    Attributes:
        model: Folder of the trained model, in bfloat16.
        quantized: Folder of its FP8 checkpoint.
        text: The held-out text.
        trained: Whether the model was trained in this run, rather than kept from an earlier one.
        verified: Number of quantized weights in which no fault was found.
        unigram_perplexity: Perplexity of the text for a model that only knows how frequent each
            byte is.
        evaluation: The quantized model against the original.
    """

    model: Path
    quantized: Path
    text: Path
    trained: bool
    verified: int
    unigram_perplexity: float
    evaluation: Evaluation


def run(bar: Bar) -> Demo:
    """Train a small model, or take the one of an earlier run; quantize it; measure it.

    Args:
        bar: Makes a progress bar for a task.
    """
    corpus = small_model.python_library()
    folder = _cache() / f"demo-{_fingerprint(corpus)}"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"), small_model.one_thread():
        return _run(folder, corpus, bar)


def _run(folder: Path, corpus: small_model.Corpus, bar: Bar) -> Demo:
    model, quantized, text = folder / "model", folder / "model-fp8", folder / HELD_OUT
    trained = not model.exists()
    if trained:
        unfinished = folder / "unfinished"
        unfinished.mkdir(exist_ok=True)
        with bar("training") as progress:
            small_model.make(unfinished, CONFIG, corpus, RECIPE, progress)
        unfinished.replace(model)
    text.write_text(corpus.held_out, encoding="utf-8")
    quantize_checkpoint(model, quantized, overwrite=True)
    verification = verify_checkpoint(quantized, model)
    if verification.faults:
        fault = verification.faults[0]
        raise CheckpointError(f"{fault.where}: {fault.what}")
    with bar("evaluating") as progress:
        evaluation = evaluate_checkpoint(
            model, quantized, text=text, tokens=TOKENS, progress=progress
        )
    return Demo(
        model=model,
        quantized=quantized,
        text=text,
        trained=trained,
        verified=verification.quantized,
        unigram_perplexity=small_model.unigram_perplexity(corpus),
        evaluation=evaluation,
    )


def _cache() -> Path:
    # The XDG Base Directory Specification: unset, empty and relative values mean the default.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "nxdi-expertscale"


def _fingerprint(corpus: small_model.Corpus) -> str:
    """Digest of all that the model follows from."""
    recipe = json.dumps([CONFIG, asdict(RECIPE), corpus.digest])
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]
