"""Tensor-parallel layers. A parameter says itself how it is cut for the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from neuronx_distributed.parallel_layers import parallel_state


def set_tensor_model_parallel_attributes(
    tensor: torch.Tensor, is_parallel: bool, dim: int, stride: int, num_partitions: int
) -> None:
    tensor.tensor_model_parallel = is_parallel
    tensor.partition_dim = dim
    tensor.partition_stride = stride
    tensor.num_partitions = num_partitions


def parallel_parameter(
    shape: tuple[int, ...], dtype: torch.dtype, dim: int, stride: int = 1
) -> nn.Parameter:
    """A rank's part of a weight that is cut along ``dim``."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    ranks = parallel_state.get_tensor_model_parallel_size()
    set_tensor_model_parallel_attributes(parameter, True, dim, stride, ranks)
    return parameter


def gather_last_axis(tensor: torch.Tensor) -> torch.Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor, group=parallel_state.get_tensor_model_parallel_group())
    return tensor


class ColumnParallelLinear(nn.Module):
    """``[out / ranks, in]``: each rank computes some of the outputs."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        stride: int = 1,
    ) -> None:
        super().__init__()
        assert not bias
        ranks = parallel_state.get_tensor_model_parallel_size()
        self.input_size, self.output_size = input_size, output_size
        self.gather_output, self.dtype, self.stride = gather_output, dtype, stride
        self.weight = parallel_parameter((output_size // ranks, input_size), dtype, 0, stride)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = F.linear(hidden_states, self.weight)
        return gather_last_axis(output) if self.gather_output else output


class RowParallelLinear(nn.Module):
    """``[out, in / ranks]``: each rank computes a summand of every output."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        reduce_output: bool = True,
    ) -> None:
        super().__init__()
        assert not bias
        ranks = parallel_state.get_tensor_model_parallel_size()
        self.input_size, self.output_size = input_size, output_size
        self.dtype, self.reduce_output = dtype, reduce_output
        self.weight = parallel_parameter((output_size, input_size // ranks), dtype, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = F.linear(hidden_states, self.weight)
        return sum_over_ranks(output) if self.reduce_output else output


class ParallelEmbedding(nn.Module):
    """``[vocab, hidden / ranks]``."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        ranks = parallel_state.get_tensor_model_parallel_size()
        self.weight = parallel_parameter((num_embeddings, embedding_dim // ranks), dtype, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return gather_last_axis(F.embedding(tokens, self.weight))


class SPMDRank(nn.Module):
    """A rank's own number, which it reads from the checkpoint."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.rank = nn.Parameter(torch.zeros(1, dtype=torch.int32), requires_grad=False)
        set_tensor_model_parallel_attributes(self.rank, True, 0, 1, world_size)
