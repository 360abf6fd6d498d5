"""A whole checkpoint into that of one rank."""

from __future__ import annotations

import torch
from torch import nn


def get_sharded_checkpoint(
    checkpoint: dict[str, torch.Tensor],
    model: nn.Module,
    rank: int,
    tp_degree: int,
    is_cached: bool = False,
) -> None:
    """Cut each tensor as the model's parameters say, in place; drop what the model has not."""
    if not is_cached:
        _run_hooks(model, checkpoint, "")
        for name in checkpoint.keys() - model.state_dict().keys():
            del checkpoint[name]
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            if hasattr(parameter, "tensor_model_parallel"):
                _cut(checkpoint, prefix, name, parameter, rank)


def _run_hooks(module: nn.Module, checkpoint: dict[str, torch.Tensor], prefix: str) -> None:
    if hasattr(module, "preshard_hook"):
        module.preshard_hook(checkpoint, prefix + "weight")
        return
    for name, child in module.named_children():
        _run_hooks(child, checkpoint, f"{prefix}{name}.")


def _cut(
    checkpoint: dict[str, torch.Tensor],
    prefix: str,
    name: str,
    parameter: nn.Parameter,
    rank: int,
) -> None:
    key = prefix + name
    if hasattr(parameter, "get_tensor_from_state_dict"):
        tensor = parameter.get_tensor_from_state_dict(prefix, checkpoint)
    elif key in checkpoint:
        tensor = checkpoint[key]
    else:
        return
    if parameter.tensor_model_parallel:
        tensor = torch.cat(
            [part[rank] for part in _parts(tensor, parameter)], parameter.partition_dim
        )
    if tensor.shape != parameter.shape:
        raise RuntimeError(f"expected shape {parameter.shape} for {key} but found {tensor.shape}")
    checkpoint[key] = tensor


def _parts(tensor: torch.Tensor, parameter: nn.Parameter) -> list[tuple[torch.Tensor, ...]]:
    """The blocks that lie side by side, each of them cut for every rank."""
    dim = parameter.partition_dim
    sizes = getattr(parameter, "fused_sizes", None)
    blocks = tensor.split(sizes, dim) if sizes else tensor.chunk(parameter.partition_stride, dim)
    return [block.tensor_split(parameter.num_partitions, dim) for block in blocks]
