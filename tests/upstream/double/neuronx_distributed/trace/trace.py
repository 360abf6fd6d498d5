"""A whole checkpoint into that of one rank."""

from __future__ import annotations

import torch
from torch import nn


def preprocess_checkpoint(model: nn.Module, checkpoint: dict[str, torch.Tensor]) -> None:
    """Give each tensor the name of the parameter that takes it; drop what the model has not."""
    invoke_preshard_hook(model, checkpoint, "")
    for name in checkpoint.keys() - model.state_dict().keys():
        del checkpoint[name]


def get_sharded_checkpoint(
    checkpoint: dict[str, torch.Tensor],
    model: nn.Module,
    rank: int,
    tp_degree: int,
    is_cached: bool = False,
) -> None:
    """Cut each tensor as the model's parameters say, in place."""
    if not is_cached:
        preprocess_checkpoint(model, checkpoint)
    shard_children(model, checkpoint, "", None, rank, tp_degree)


def invoke_preshard_hook(
    module: nn.Module | None, checkpoint: dict[str, torch.Tensor], prefix: str
) -> None:
    if module is None:
        return
    if hasattr(module, "preshard_hook"):
        module.preshard_hook(checkpoint, prefix + "weight")
        return
    for name, child in module._modules.items():
        invoke_preshard_hook(child, checkpoint, f"{prefix}{name}.")


def shard_children(
    module: nn.Module,
    checkpoint: dict[str, torch.Tensor],
    prefix: str,
    dtype: torch.dtype | None,
    rank: int,
    tp_degree: int,
) -> None:
    for path, child in module.named_modules():
        child_prefix = f"{prefix}{path}." if path else prefix
        for name, parameter in child.named_parameters(recurse=False):
            if hasattr(parameter, "tensor_model_parallel"):
                _cut(checkpoint, child_prefix, name, parameter, rank)


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
