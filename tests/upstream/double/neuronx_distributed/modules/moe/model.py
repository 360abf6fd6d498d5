"""The MoE block: a router, and experts whose weights are fused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from neuronx_distributed.modules.moe.moe_parallel_layers import (
    ExpertFusedColumnParallelLinear,
    ExpertFusedRowParallelLinear,
)
from neuronx_distributed.parallel_layers.layers import sum_over_ranks

SELECTIVE_LOADING_THRESHOLD = 1.0


class RouterTopK(nn.Module):
    def __init__(self, num_experts: int, top_k: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.top_k = top_k
        self.linear_router = nn.Linear(hidden_size, num_experts, bias=False, dtype=dtype)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Affinities ``[T, E]``, and the experts of each token ``[T, top_k]``."""
        logits = self.linear_router(hidden_states.to(self.linear_router.weight.dtype))
        affinities = logits.to(torch.float64).softmax(dim=-1).to(hidden_states.dtype)
        return affinities, logits.topk(self.top_k).indices


class Experts(nn.Module):
    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.gate_up_proj = ExpertFusedColumnParallelLinear(
            num_experts, hidden_size, 2 * intermediate_size, dtype, stride=2
        )
        self.down_proj = ExpertFusedRowParallelLinear(
            num_experts, intermediate_size, hidden_size, dtype
        )

    def forward(
        self, hidden_states: torch.Tensor, expert_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[1, T, H]`` through all experts, or some: ``[E, T, H]``."""
        gate, up = self.gate_up_proj(hidden_states[:, None], expert_indices).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up, expert_indices).squeeze(1)


class ExpertMLPsV2(nn.Module):
    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        normalize_top_k_affinities: bool,
    ) -> None:
        super().__init__()
        if normalize_top_k_affinities and top_k <= 1:
            raise ValueError("top_k must be greater than 1 for normalizing top-k expert affinities")
        self.num_experts, self.top_k = num_experts, top_k
        self.normalize = normalize_top_k_affinities
        self.mlp_op = Experts(num_experts, hidden_size, intermediate_size, dtype)

    def forward(
        self, hidden_states: torch.Tensor, affinities: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        weights = affinities.gather(1, chosen)
        if self.normalize:
            weights = F.normalize(weights, p=1.0, dim=1)
        if len(hidden_states) * self.top_k / self.num_experts < SELECTIVE_LOADING_THRESHOLD:
            return self._only_chosen(hidden_states, weights, chosen)
        everywhere = torch.zeros_like(affinities).scatter(1, chosen, weights)
        return torch.einsum("eth,te->th", self.mlp_op(hidden_states[None]), everywhere)

    def _only_chosen(
        self, hidden_states: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        outputs = [
            (self.mlp_op(token[None, None], experts).squeeze(1) * weight[:, None]).sum(dim=0)
            for token, weight, experts in zip(hidden_states, weights, chosen, strict=True)
        ]
        return torch.stack(outputs)


class MoE(nn.Module):
    def __init__(self, router: RouterTopK, expert_mlps: ExpertMLPsV2) -> None:
        super().__init__()
        self.router = router
        self.expert_mlps = expert_mlps

    def forward(self, hidden_states: torch.Tensor, *_: object) -> tuple[torch.Tensor]:
        """``[B, S, H]`` in and, first of a tuple, out."""
        tokens = hidden_states.flatten(0, 1)
        output = self.expert_mlps(tokens, *self.router(tokens))
        return (sum_over_ranks(output).view_as(hidden_states),)
