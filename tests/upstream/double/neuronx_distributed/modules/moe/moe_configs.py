"""Settings of the experts and of the router."""

from __future__ import annotations

from typing import Any

import torch

from neuronx_distributed.modules.moe.blockwise import LogicalNCConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BlockwiseMatmulConfig:
    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)

    @staticmethod
    def from_kwargs(**settings: Any) -> BlockwiseMatmulConfig:
        defaults = {
            "block_size": 512,
            "logical_nc_config": LogicalNCConfig.LNC_2,
            "use_torch_block_wise": False,
            "use_shard_on_intermediate_dynamic_while": False,
        }
        return BlockwiseMatmulConfig(
            **{name: settings.get(name, default) for name, default in defaults.items()}
        )


class RouterConfig:
    def __init__(self, act_fn: str = "softmax", dtype: torch.dtype | str = torch.float32) -> None:
        self.act_fn = act_fn
        self.dtype = _DTYPES[dtype] if isinstance(dtype, str) else dtype

    @staticmethod
    def from_kwargs(**settings: Any) -> RouterConfig:
        return RouterConfig(
            settings.get("router_act_fn", "softmax"), settings.get("router_dtype", torch.float32)
        )
