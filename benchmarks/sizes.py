"""What quantizing and serving the published models takes, computed from their configs.

    python -m benchmarks.sizes

Sizes are those of the tensors that ``quantize`` reads and writes. How long it takes is a rate that
was measured once, ``benchmarks/quantize.py`` with 10 GB on two cores, and the disk's in the main.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9
MEASURED_RATE = 10 * GB / 21.8
"""Bytes of a source that ``quantize`` converts in a second."""

QUANTIZE_GB = 0.3
"""Memory of ``quantize``, whatever the model's size."""

CORE_GB = 24
"""Memory of a logical NeuronCore of trn2: 96 GB of a chip for four of them."""

FILLED = 0.75
"""The part of it that weights may take here; caches, programs and activations need the rest."""

_BFLOAT16, _FP8, _SCALE = 2, 1, 4


@dataclass(frozen=True)
class Published:
    """A published Qwen3 MoE, in the words of its ``config.json``."""

    name: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    moe_intermediate_size: int
    vocab_size: int = 151_936

    @property
    def linears(self) -> list[tuple[int, int, int]]:
        """Its quantized weights: how many there are, outputs, inputs."""
        layers, hidden, inner = self.num_hidden_layers, self.hidden_size, self.moe_intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        experts = layers * self.num_experts
        return [
            (2 * experts, inner, hidden),
            (experts, hidden, inner),
            (layers, queries, hidden),
            (2 * layers, keys, hidden),
            (layers, hidden, queries),
            (1, self.vocab_size, hidden),
        ]

    @property
    def kept(self) -> int:
        """Elements that stay in bfloat16: embeddings, routers, norms."""
        norms = 2 * self.hidden_size + 2 * self.head_dim
        layer = self.num_experts * self.hidden_size + norms
        return (self.vocab_size + 1) * self.hidden_size + self.num_hidden_layers * layer

    @property
    def bfloat16_bytes(self) -> int:
        """Bytes of its tensors as they are published."""
        linear = sum(count * rows * columns for count, rows, columns in self.linears)
        return _BFLOAT16 * (linear + self.kept)

    @property
    def fp8_bytes(self) -> int:
        """Bytes of its tensors once ``quantize`` has written them."""
        linear = sum(
            count * rows * (columns * _FP8 + _SCALE) for count, rows, columns in self.linears
        )
        return linear + _BFLOAT16 * self.kept

    def smallest_tp_degree(self, nbytes: int) -> int:
        """The smallest power of two over whose cores weights of a size fit."""
        degree = 4
        while nbytes / degree > FILLED * CORE_GB * GB:
            degree *= 2
        return degree


MODELS = (
    Published("Qwen3-30B-A3B", 48, 2048, 32, 4, 128, 128, 768),
    Published("Qwen3-235B-A22B", 94, 4096, 64, 4, 128, 128, 1536),
    Published("Qwen3-Coder-480B-A35B", 62, 6144, 96, 8, 128, 160, 2560),
)


def render() -> str:
    """The table, in Markdown."""
    rows = {
        "the original, bfloat16": [_gigabytes(model.bfloat16_bytes) for model in MODELS],
        "the FP8 folder": [_gigabytes(model.fp8_bytes) for model in MODELS],
        "disk for both": [_gigabytes(model.bfloat16_bytes + model.fp8_bytes) for model in MODELS],
        "`quantize`: memory": [f"{QUANTIZE_GB} GB" for _ in MODELS],
        "`quantize`: time": [_minutes(model.bfloat16_bytes / MEASURED_RATE) for model in MODELS],
        "host memory while NxDI loads, at least": [_gigabytes(model.fp8_bytes) for model in MODELS],
        "cores (`tp_degree`) for the FP8 weights": [
            str(model.smallest_tp_degree(model.fp8_bytes)) for model in MODELS
        ],
        "cores for the weights in bfloat16": [
            str(model.smallest_tp_degree(model.bfloat16_bytes)) for model in MODELS
        ],
    }
    lines = [
        f"| | {' | '.join(model.name for model in MODELS)} |",
        f"|---|{'---:|' * len(MODELS)}",
    ]
    return "\n".join(lines + [f"| {name} | {' | '.join(row)} |" for name, row in rows.items()])


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / GB:.0f} GB"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    print(render())
