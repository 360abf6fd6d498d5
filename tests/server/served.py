"""The models that the servers of these tests serve, and what Hugging Face answers with them."""

from __future__ import annotations

import hashlib
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

from benchmarks.lm_eval_task import write_tokenizer
from nxdi_expertscale.evaluation import small_model
from nxdi_expertscale.numerics.fp8 import quantize_per_channel
from tests.harness import models

VOCABULARY = 1280
"""NxDI's sampler looks at the 256 best tokens, in 0.7 of each of up to four cores."""

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


def round_to_bfloat16(checkpoint: Path, folder: Path) -> Path:
    """Write a model in bfloat16, as models are published."""
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(folder)
    _add_tokenizer(folder)
    return folder


def save_dense(folder: Path) -> Path:
    """Write a dense Qwen3 that can draft for the MoE."""
    models.save_qwen3(folder, **SIZES)
    _add_tokenizer(folder)
    return folder


def save_trained(folder: Path) -> Path:
    """Write a Qwen3 MoE that was trained on text for a minute; its tokens are bytes.

    Its experts differ by a factor of 16, as those of large models do.
    """
    trained = folder / "trained"
    for made in (folder, trained):
        made.mkdir()
    config = small_model.qwen3_moe_config(hidden_size=64, moe_intermediate_size=64)
    small_model.make(trained, config, small_model.python_library(), small_model.Recipe(steps=200))
    small_model.spread_experts(trained, folder, factor=16)
    shutil.rmtree(trained)
    write_tokenizer(folder)
    return folder


def quantize_dense(checkpoint: Path, folder: Path) -> Path:
    """Write the FP8 checkpoint of a dense model, every linear of it, as NxDI's own step does."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("_proj.weight", "lm_head.weight"))]:
        weight, scale = quantize_per_channel(tensors[name])
        tensors |= {name: weight, f"{name}_scale": scale}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
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


def rounds_to(
    answers: Sequence[Sequence[int]],
    checkpoint: Path,
    dtype: torch.dtype,
    prompts: Sequence[Sequence[int]] = PROMPTS,
) -> bool:
    """Whether Hugging Face, given what stands before it, could choose each token as well.

    Two logits that lie closer than a dtype rounds them are chosen from by the order of additions.
    How far it rounds is measured: by the largest difference from Hugging Face in float32.
    """
    rounded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        text = torch.tensor([[*prompt, *answer[:-1]]])
        with torch.no_grad():
            logits = rounded(text).logits[0, len(prompt) - 1 :].float()
            rounding = (logits - exact(text).logits[0, len(prompt) - 1 :]).abs().max()
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        if (logits.max(1).values - chosen > 2 * rounding).any():
            return False
    return True


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """Of each file, when it was written and a digest of it."""
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
    }
