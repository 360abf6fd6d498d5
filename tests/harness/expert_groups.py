"""NxD's groups of ranks for expert parallelism, on gloo.

NxD makes the first group of each kind and leaves the others to an option of XLA's groups
(``modules/moe/moe_process_group.py``). Here each rank gets the group that it is in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed


class Degrees(NamedTuple):
    """How the ranks share a layer's experts: cut each of them, or take some each."""

    tensor: int
    expert: int


def make(*, context: Degrees, generation: Degrees) -> None:
    """Make the groups that NxD would make for hybrid sharding, or for one of both degrees."""
    from neuronx_distributed.modules.moe import moe_process_group
    from neuronx_distributed.parallel_layers import parallel_state

    # NxD reads this from a group of XLA's; a group of gloo's has nothing of the kind.
    meshes: dict[int, list[list[int]]] = {}

    def expert_rank(rank: int, expert_parallel_group: Any) -> int:
        mesh = meshes[id(expert_parallel_group)]
        return next(ranks.index(rank) for ranks in mesh if rank in ranks)

    parallel_state.get_expert_parallel_rank_from_global_rank = expert_rank
    for stage, degrees in (("CTE", context), ("TKG", generation)):
        replicas = parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=degrees.tensor,
            expert_model_parallel_size=degrees.expert,
            mesh_only=True,
        )
        for kind, mesh in (("TENSOR", replicas.tp_groups), ("EXPERT", replicas.ep_model_groups)):
            group = _own_group(mesh)
            meshes[id(group)] = mesh
            setattr(moe_process_group, f"_MOE_{stage}_{kind}_MODEL_PARALLEL_GROUP", group)


def _own_group(mesh: list[list[int]]) -> Any:
    # Every rank has to make every group, in the same order.
    groups = [(ranks, torch.distributed.new_group(ranks)) for ranks in mesh]
    rank = torch.distributed.get_rank()
    return next(group for ranks, group in groups if rank in ranks)
