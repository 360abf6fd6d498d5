"""Checkpoints on disk: one safetensors file, several with an index, or a torch pickle."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file


def load_state_dict(state_dict_dir: str) -> dict[str, torch.Tensor]:
    folder = Path(state_dict_dir)
    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return {key: value for name in names for key, value in load_file(folder / name).items()}
    if (folder / "pytorch_model.bin").is_file():
        return torch.load(folder / "pytorch_model.bin", mmap=True, map_location="cpu")
    raise FileNotFoundError(
        f"Can not find model.safetensors or pytorch_model.bin in {state_dict_dir}"
    )


def save_state_dict_safetensors(
    state_dict: dict[str, torch.Tensor], state_dict_dir: str, max_shard_size: str = "10GB"
) -> None:
    save_torch_state_dict(
        state_dict,
        save_directory=state_dict_dir,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
