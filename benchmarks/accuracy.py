"""How good is FP8 with one scale per expert, on a model that was trained?

Trains a small Qwen3 MoE (transformers' own class) on the sources of Python's library, quantizes
it, and measures it on files that were kept from training::

    python -m benchmarks.accuracy WORK [--json FILE]

What is in WORK from an earlier run, the trained model above all, is used again. With
``NXDI_EXPERTSCALE_UPSTREAM`` naming the real sources (see ``tests/upstream``), the same model goes
through NxDI on a CPU; where ``lm_eval`` is installed, through that as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from nxdi_expertscale import small_model

CONFIG = small_model.qwen3_moe_config(hidden_size=128, moe_intermediate_size=128)
RECIPE = small_model.Recipe(steps=600, learning_rate=3e-3)


def trained(folder: Path, corpus: small_model.Corpus) -> Path:
    """The trained model in bfloat16: that of an earlier run, or a new one."""
    if folder.is_dir():
        return folder
    torch.manual_seed(RECIPE.seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).to(torch.float32)
    with small_model.one_thread():
        small_model.train(
            lambda tokens: model(tokens).logits, list(model.parameters()), corpus, RECIPE, _say
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _say(step: int, steps: int) -> None:
    if step % 25 == 0:
        print(f"training: step {step} of {steps}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    options = parser.parse_args()
    corpus = small_model.python_library()
    trained(options.work / "model", corpus)


if __name__ == "__main__":
    main()
