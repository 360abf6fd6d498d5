"""A small mixture-of-experts model, trained here on text that every machine has.

The text is Python's own library. The same machine with the same Python and torch gets the same
model again; another Python has another library, so the figures differ a little.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from nxdi_expertscale.checkpoint.read.config import read_config
from nxdi_expertscale.checkpoint.read.files import CONFIG, SINGLE_FILE
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.display.progress import Progress
from nxdi_expertscale.evaluation import decoder
from nxdi_expertscale.evaluation.architecture import EMBEDDINGS, LM_HEAD, derive_architecture
from nxdi_expertscale.families.built_in import QWEN3_MOE

BYTES = 256
"""The vocabulary: a token is a byte."""

CONTEXT = 256
"""Tokens of a sequence, in training and in use."""

_HELD_OUT = 16
"""One file in so many is held out from training."""

_EXCERPT = 1024
"""Characters of each of them: a text of many files, however little of it is used."""

_LEFT_OUT = frozenset({"encodings", "pydoc_data", "site-packages", "test", "tests"})
"""Folders of tables, of installed packages, and of tests, which not every Python has."""


@dataclass(frozen=True)
class Corpus:
    """Text to train on, and held-out text of the same kind."""

    training: str
    held_out: str

    @property
    def digest(self) -> str:
        """SHA-256 of both, hexadecimal."""
        return hashlib.sha256(f"{self.training}\0{self.held_out}".encode()).hexdigest()


def python_library() -> Corpus:
    """The sources of Python's library; of every sixteenth file the middle is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in root.rglob("*.py")
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts[:-1])
    )
    texts = [_read_source(path) for path in files]
    held_out = "".join(_middle(text) for text in texts[::_HELD_OUT])
    del texts[::_HELD_OUT]
    return Corpus("".join(texts), held_out)


def _middle(text: str) -> str:
    start = max(0, len(text) - _EXCERPT) // 2
    return text[start : start + _EXCERPT]


def _read_source(path: Path) -> str:
    # Not every file is UTF-8: a source says in its first lines what it is.
    with tokenize.open(path) as file:
        return file.read()


def unigram_perplexity(corpus: Corpus) -> float:
    """Perplexity of the held-out bytes for a model that knows only how frequent each byte is."""
    seen = as_bytes(corpus.training).long().bincount(minlength=BYTES).double() + 1
    held_out = as_bytes(corpus.held_out).long().bincount(minlength=BYTES).double()
    loss = -(held_out * (seen / seen.sum()).log()).sum() / held_out.sum()
    return float(loss.exp())


def as_bytes(text: str) -> torch.Tensor:
    """A text's bytes in UTF-8, ``[length]``, ``torch.uint8``."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        steps: Number of steps.
        batch: Sequences in a step.
        learning_rate: The highest; it rises over a tenth of the steps and falls again.
        seed: Of the initial weights and of the choice of sequences.
    """

    steps: int
    batch: int = 8
    learning_rate: float = 4e-3
    seed: int = 0


def qwen3_moe_config(*, hidden_size: int, moe_intermediate_size: int) -> dict[str, Any]:
    """``config.json`` of a Qwen3 MoE with 4 layers of 16 experts, of which 4 are chosen."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": BYTES,
        "hidden_size": hidden_size,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": moe_intermediate_size,
        "intermediate_size": moe_intermediate_size,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "initializer_range": hidden_size**-0.5,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def train(
    logits: Callable[[torch.Tensor], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    corpus: Corpus,
    recipe: Recipe,
    progress: Progress | None = None,
) -> None:
    """Train a model on a corpus, in place.

    Args:
        logits: Gives the logits of the next tokens, ``[batch, length, BYTES]``, for tokens
            ``[batch, length]``.
        parameters: What it computes with.
        corpus: The text.
        recipe: How to train.
        progress: Called with the steps that are done, and all of them.
    """
    data = as_bytes(corpus.training)
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    offsets = torch.arange(CONTEXT + 1)
    for step in range(recipe.steps):
        starts = torch.randint(data.numel() - CONTEXT, (recipe.batch, 1), generator=generator)
        tokens = data[starts + offsets].long()
        loss = functional.cross_entropy(
            logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, recipe.steps)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread.

    Matrices this small gain little from a second one, and where other programs use the cores as
    well they lose ten times what they gain.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make(
    folder: Path,
    config: Mapping[str, Any],
    corpus: Corpus,
    recipe: Recipe,
    progress: Progress | None = None,
) -> None:
    """Train a model in plain torch, and write it as a Hugging Face checkpoint in bfloat16.

    In one thread (:func:`one_thread`) a recipe gives the same bytes each time; several add up in
    an order of their own.

    Args:
        folder: The folder to write, there already.
        config: What its ``config.json`` is to hold.
        corpus: The text to train on.
        recipe: How to train.
        progress: Called with the steps that are done, and all of them.
    """
    model = derive_architecture(read_config(config, QWEN3_MOE, CONFIG), QWEN3_MOE)
    generator = torch.Generator().manual_seed(recipe.seed)
    weights = {
        name: _initial(name, shape, generator).requires_grad_() for name, shape in model.shapes()
    }
    train(
        lambda tokens: decoder.forward(tokens, weights.__getitem__, model),
        list(weights.values()),
        corpus,
        recipe,
        progress,
    )
    stored = {
        name if name == LM_HEAD else f"model.{name}": value.detach().to(torch.bfloat16)
        for name, value in weights.items()
    }
    save_file(stored, folder / SINGLE_FILE, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    deviation = 0.02 if name == EMBEDDINGS else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * deviation


def spread_experts(model: Path, folder: Path, factor: int) -> None:
    """Write a model that computes the same, and whose experts differ in magnitude.

    The up projection of an expert is multiplied by a power of two, and its down projection
    divided by it: not a bit of what it computes changes. The experts' magnitudes then lie apart
    as far as asked for, where those of a small model trained for minutes hardly do.

    Args:
        model: Folder of a Qwen3 MoE in full precision, with one file of weights.
        folder: The folder to write, there already.
        factor: Between the experts with the largest and the smallest magnitude; a power of two.
    """
    weights = load_file(model / SINGLE_FILE)
    num_experts = open_model(model).config.num_experts
    octaves = factor.bit_length() - 1
    for name, weight in weights.items():
        place = QWEN3_MOE.names.parse_expert_key(name)
        if place is None or place.projection == QWEN3_MOE.gate:
            continue
        exponent = round(octaves * place.expert / (num_experts - 1)) - octaves // 2
        weight.mul_(2.0 ** (-exponent if place.projection == QWEN3_MOE.down else exponent))
    save_file(weights, folder / SINGLE_FILE, metadata={"format": "pt"})
    shutil.copy(model / CONFIG, folder)
