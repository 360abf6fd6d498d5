"""Logits of a model as NxDI computes it on a CPU, for windows of tokens: a program of its own.

Two releases of NxDI cannot be imported in one process, so ``benchmarks/accuracy.py`` starts this
one for each::

    python -m benchmarks.through_nxdi RELEASE MODEL QUANTIZED WINDOWS.safetensors OUT.safetensors

It reads ``windows``, ``[count, length]``, and writes logits of the token after each, ``[count,
vocabulary]``: ``original`` of MODEL, ``expert_wise`` and ``averaged`` of QUANTIZED, with and
without ``expert_wise_scale``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import nxdi_expertscale  # noqa: F401  (activates it)
from tests.harness import targets

WINDOWS = "windows"


def logits(
    nxdi: Any, model: Path, quantized: Path, windows: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Logits of the token after each window, by the names that this program writes.

    Args:
        nxdi: :mod:`tests.harness.running`, on one rank.
        model: Folder of the original.
        quantized: Folder of the FP8 checkpoint.
        windows: Tokens, ``[count, length]``.
    """
    length = windows.shape[1]
    bucket = {"seq_len": length, "max_context_length": length}
    fp8: dict[str, Any] = {
        **nxdi.FP8,
        "quantized_checkpoints_path": str(quantized),
        "modules_to_not_convert": [nxdi.ROUTER],
    }
    settings: dict[str, dict[str, Any]] = {
        "original": {},
        "expert_wise": {**fp8, "expert_wise_scale": True},
        "averaged": {**fp8, "expert_wise_scale": False},
    }
    found = {}
    for name, chosen in settings.items():
        loaded = nxdi.load(model, **bucket, **chosen)
        found[name] = torch.cat([loaded.logits(window[None]).float() for window in windows])
    return found


def main(release: str, model: Path, quantized: Path, windows: Path, out: Path) -> None:
    batch = load_file(windows)[WINDOWS]
    with targets.all_targets()[release].on_one_rank() as nxdi:
        save_file(logits(nxdi, model, quantized, batch), out)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
