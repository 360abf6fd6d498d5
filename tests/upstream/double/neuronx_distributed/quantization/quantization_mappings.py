"""Which quantized layer takes the place of which: by the exact type, not by inheritance."""

from __future__ import annotations

from neuronx_distributed.modules.moe import moe_parallel_layers
from neuronx_distributed.parallel_layers import layers
from neuronx_distributed.quantization import quantization_layers

_MAPPING = {
    layers.ColumnParallelLinear: quantization_layers.QuantizedColumnParallel,
    layers.RowParallelLinear: quantization_layers.QuantizedRowParallel,
    moe_parallel_layers.ExpertFusedColumnParallelLinear: (
        quantization_layers.QuantizedExpertFusedColumnParallel
    ),
    moe_parallel_layers.ExpertFusedRowParallelLinear: (
        quantization_layers.QuantizedExpertFusedRowParallel
    ),
}


def get_default_quant_module_mappings() -> dict[type, type]:
    return _MAPPING
