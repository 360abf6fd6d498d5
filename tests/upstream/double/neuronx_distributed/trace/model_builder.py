"""Compiles a model's graphs, and cuts its weights for the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_neuronx
from safetensors.torch import save_file

from neuronx_distributed.parallel_layers import parallel_state
from neuronx_distributed.trace.trace import get_sharded_checkpoint, preprocess_checkpoint


@dataclass
class ModelContainer:
    """One graph of a model."""

    model_instance: Any


class ModelBuilder:
    def __init__(
        self, checkpoint_loader: Callable[[], dict[str, torch.Tensor]], tp_degree: int
    ) -> None:
        self.checkpoint_loader = checkpoint_loader
        self.tp_degree = tp_degree
        self.start_rank_id, self.local_ranks_size = 0, tp_degree
        self.model_collection: dict[str, ModelContainer] = {}

    def add(self, key: str, model_instance: Any) -> None:
        self.model_collection[key] = ModelContainer(model_instance)

    def trace(
        self,
        initialize_model_weights: bool = True,
        dry_run: bool = False,
        disable_fail_fast: bool = False,
    ) -> None:
        """Compile every graph; the weights are read afterwards, if at all."""
        with parallel_state.mocked_ranks(self.tp_degree):
            for container in self.model_collection.values():
                container.model_instance.load_module()
                model, _ = container.model_instance.get(0)
                torch_neuronx.xla_impl.trace.generate_hlo(model)

    def shard_checkpoint(self, serialize_path: str | None = None) -> list[dict[str, torch.Tensor]]:
        """The weights of each rank, written to a folder as well if one is named."""
        instance = next(iter(self.model_collection.values())).model_instance
        ranks = range(self.start_rank_id, self.start_rank_id + self.local_ranks_size)
        with parallel_state.mocked_ranks(self.tp_degree):
            with torch.device("meta"):
                instance.load_module()
            model, _ = instance.get(0)
            checkpoint = self.checkpoint_loader()
            preprocess_checkpoint(model, checkpoint)
            shards = []
            for rank in ranks:
                shards.append(dict(checkpoint))
                get_sharded_checkpoint(shards[-1], model, rank, self.tp_degree, is_cached=True)
        for rank, shard in zip(ranks, shards, strict=True):
            if serialize_path is not None:
                Path(serialize_path).mkdir(parents=True, exist_ok=True)
                file = Path(serialize_path, f"tp{rank}_sharded_checkpoint.safetensors")
                save_file({name: value.contiguous() for name, value in shard.items()}, file)
        return shards
