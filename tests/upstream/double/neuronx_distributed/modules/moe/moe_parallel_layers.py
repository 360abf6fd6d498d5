"""The experts' linear layers: all experts of a layer in one weight."""

from __future__ import annotations

import torch
from torch import nn

from neuronx_distributed.parallel_layers import parallel_state
from neuronx_distributed.parallel_layers.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    parallel_parameter,
)


class ExpertFusedLinear(nn.Module):
    """What the layers of experts have in common."""


def multiply(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[E or 1, ..., in]`` with ``[E, in, out]``."""
    return torch.einsum("e...h,ehi->e...i", hidden_states, weight)


class ExpertFusedColumnParallelLinear(ColumnParallelLinear, ExpertFusedLinear):
    """``[E, in, out / ranks]``."""

    def __init__(
        self,
        num_experts: int,
        input_size: int,
        output_size: int,
        dtype: torch.dtype = torch.float32,
        stride: int = 1,
    ) -> None:
        nn.Module.__init__(self)
        ranks = parallel_state.get_tensor_model_parallel_size()
        self.num_experts = self._n_local_experts = num_experts
        self.input_size, self.output_size = input_size, output_size
        self.dtype, self.stride = dtype, stride
        shape = (num_experts, input_size, output_size // ranks)
        self.weight = parallel_parameter(shape, dtype, 2, stride)

    def forward(
        self, hidden_states: torch.Tensor, expert_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = self.weight if expert_indices is None else self.weight[expert_indices]
        return multiply(hidden_states, weight)


class ExpertFusedRowParallelLinear(RowParallelLinear, ExpertFusedLinear):
    """``[E, in / ranks, out]``; the sum over ranks is taken after the experts are combined."""

    def __init__(
        self,
        num_experts: int,
        input_size: int,
        output_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)
        ranks = parallel_state.get_tensor_model_parallel_size()
        self.num_experts = self._n_local_experts = num_experts
        self.input_size, self.output_size = input_size, output_size
        self.dtype, self.stride = dtype, 1
        shape = (num_experts, input_size // ranks, output_size)
        self.weight = parallel_parameter(shape, dtype, 1)

    def forward(
        self, hidden_states: torch.Tensor, expert_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = self.weight if expert_indices is None else self.weight[expert_indices]
        return multiply(hidden_states, weight)
