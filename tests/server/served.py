"""The models that the servers of these tests serve, and what Hugging Face answers with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.harness import models

VOCABULARY = 512
"""NxDI's sampler looks at the 256 best tokens, so there have to be more."""

SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 4096}
"""Positions are more than a server is asked for, as with a published model."""

PROMPTS = [[5, 17, 33], [9, 8, 7, 6, 5, 4, 3, 2], list(range(20, 60))]
"""Of different lengths. A prompt of one token is answered wrongly by NxDI itself, unquantized as
well: it pads positions with 1, and takes the token at the largest one for the last."""

TOKENS = 8
"""How many are asked for."""


def save_moe(folder: Path) -> Path:
    """Write a Qwen3 MoE with a tokenizer, whose experts differ by a factor of 16."""
    models.save_qwen3_moe(folder, spread=16.0, **SIZES)
    _add_tokenizer(folder)
    return folder


def save_dense(folder: Path) -> Path:
    """Write a dense Qwen3 that can draft for the MoE."""
    models.save_qwen3(folder, **SIZES)
    _add_tokenizer(folder)
    return folder


def _add_tokenizer(checkpoint: Path) -> None:
    words = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1")
    fast.save_pretrained(checkpoint)


def tokens_of(text: str) -> list[int]:
    """The tokens of a text that the tokenizer wrote, such as ``t5 t17``."""
    return [int(word[1:]) for word in text.split()]


def dequantize(quantized: Path, folder: Path, *, averaged: bool) -> Path:
    """Write the model that an FP8 checkpoint stands for, in float32.

    Args:
        quantized: The FP8 checkpoint.
        folder: The folder to write, not there yet.
        averaged: Whether all experts of a layer share the mean of their scales.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in quantized.glob("*.safetensors"):
        tensors |= load_file(file)
    folder.mkdir()
    for companion in quantized.glob("*.json"):
        shutil.copy(companion, folder)
    config = json.loads((quantized / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)

    scales = {name: scale for name, scale in tensors.items() if name.endswith("_scale")}
    if averaged:
        scales = {name: _mean_of_experts(name, scales) for name in scales}
    weights = {name: weight.float() for name, weight in tensors.items() if name not in scales}
    for name, scale in scales.items():
        weights[name.removesuffix("_scale")] *= scale.reshape(-1, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _mean_of_experts(name: str, scales: dict[str, torch.Tensor]) -> torch.Tensor:
    layer, experts, projection = name.partition(".experts.")
    if not experts:
        return scales[name]
    kind = projection.partition(".")[2]
    same = [
        scale
        for other, scale in scales.items()
        if other.startswith(f"{layer}.experts.") and other.endswith(f".{kind}")
    ]
    return torch.stack(same).mean(0)


def answers_of_hugging_face(
    checkpoint: Path, dtype: torch.dtype, prompts: Sequence[Sequence[int]] = PROMPTS
) -> list[list[int]]:
    """What a model says, greedily, without a cache."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    answers = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(TOKENS):
            with torch.no_grad():
                logits = model(torch.tensor([text])).logits
            text.append(int(logits[0, -1].argmax()))
        answers.append(text[len(prompt) :])
    return answers
