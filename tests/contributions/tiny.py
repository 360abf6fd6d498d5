"""The random weights of tiny models, and what block FP8 makes of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

LAYERS = 2
HIDDEN = 64
INNER = 48
"""Of an expert."""
DENSE = 96
"""Of a dense feed-forward layer."""
EXPERTS = 8
CHOSEN = 2
"""Experts of a token."""
VOCABULARY = 128
HEADS, GROUPS, HEAD = 4, 2, 16
SPREAD = 16.0
"""The factor between the weights of the smallest and of the largest expert of a layer."""
BLOCK = 32
"""Rows and columns of a block of FP8."""

GATED = ("gate_proj", "up_proj", "down_proj")

COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
    "torch_dtype": "float32",
}
"""Fields that most configs have."""


class Tiny:
    """Random weights under the names of a checkpoint.

    Attributes:
        tensors: Those that were made, ``torch.float32``.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(7)

    def normal(self, name: str, *shape: int, deviation: float = 0.15) -> None:
        """Add normally distributed numbers."""
        self.tensors[name] = torch.randn(*shape, generator=self._generator) * deviation

    def norm(self, path: str, size: int) -> None:
        """Add the weight of a norm."""
        self.tensors[f"{path}.weight"] = 1 + torch.randn(size, generator=self._generator) / 10

    def linear(self, path: str, outputs: int, inputs: int, *, bias: bool = False) -> None:
        """Add a linear layer, whose output channels differ in magnitude."""
        self.normal(f"{path}.weight", outputs, inputs)
        self.tensors[f"{path}.weight"] *= self._of_channels(outputs)
        if bias:
            self.normal(f"{path}.bias", outputs, deviation=0.5)

    def feed_forward(
        self, path: str, inner: int, names: tuple[str, str, str] = GATED, factor: float = 1.0
    ) -> None:
        """Add a gated feed-forward layer: gate, up and down."""
        gate, up, down = (f"{path}.{name}" for name in names)
        for projection in (gate, up):
            self.linear(projection, inner, HIDDEN)
        self.linear(down, HIDDEN, inner)
        for projection in (gate, up, down):
            self.tensors[f"{projection}.weight"] *= factor

    def experts(self, path: str, names: tuple[str, str, str] = GATED) -> None:
        """Add the experts of a layer, each greater than the one before it."""
        for expert in range(EXPERTS):
            factor = SPREAD ** (expert / (EXPERTS - 1)) / SPREAD
            self.feed_forward(f"{path}.{expert}", INNER, names, factor)

    def stack_experts(self, path: str) -> None:
        """Make the experts of a layer one tensor for each fused weight, ``[E, out, in]``."""
        of_experts = [
            [self.tensors.pop(f"{path}.{expert}.{name}.weight") for name in GATED]
            for expert in range(EXPERTS)
        ]
        gate_up = [torch.cat((gate, up)) for gate, up, _ in of_experts]
        self.tensors[f"{path}.gate_up_proj"] = torch.stack(gate_up)
        self.tensors[f"{path}.down_proj"] = torch.stack([down for _, _, down in of_experts])

    def attention(self, path: str, *, bias: bool = False, norms: int = 0) -> None:
        """Add grouped-query attention.

        Args:
            path: Where.
            bias: Whether queries, keys and values have biases.
            norms: Width of the norms of queries and keys, if there are any.
        """
        self.linear(f"{path}.q_proj", HEADS * HEAD, HIDDEN, bias=bias)
        self.linear(f"{path}.k_proj", GROUPS * HEAD, HIDDEN, bias=bias)
        self.linear(f"{path}.v_proj", GROUPS * HEAD, HIDDEN, bias=bias)
        self.linear(f"{path}.o_proj", HIDDEN, HEADS * HEAD)
        if norms:
            self.norm(f"{path}.q_norm", norms)
            self.norm(f"{path}.k_norm", norms)

    def layer_norms(self, path: str) -> None:
        """Add the norms before attention and before the feed-forward part."""
        self.norm(f"{path}.input_layernorm", HIDDEN)
        self.norm(f"{path}.post_attention_layernorm", HIDDEN)

    def ends(self, prefix: str = "model.", embeddings: str = "embed_tokens") -> None:
        """Add the embeddings, the last norm and the head."""
        self.normal(f"{prefix}{embeddings}.weight", VOCABULARY, HIDDEN, deviation=1.0)
        self.norm(f"{prefix}norm", HIDDEN)
        self.linear("lm_head", VOCABULARY, HIDDEN)

    def layers(self, *, norms: int = 0) -> Iterator[str]:
        """Add what is usual around the feed-forward parts of :data:`LAYERS` layers.

        Args:
            norms: See :meth:`attention`.

        Yields:
            Each layer's path, for its feed-forward part to be added.
        """
        self.ends()
        for layer in range(LAYERS):
            path = f"model.layers.{layer}"
            self.layer_norms(path)
            self.attention(f"{path}.self_attn", norms=norms)
            yield path

    def routed(self, path: str, names: tuple[str, str, str] = GATED) -> None:
        """Add an MoE block that is a router and its experts."""
        self.linear(f"{path}.gate", EXPERTS, HIDDEN)
        self.experts(f"{path}.experts", names)

    def _of_channels(self, outputs: int) -> torch.Tensor:
        """Magnitudes from a half to two, so that a scale at a wrong channel shows."""
        return 2 ** (2 * torch.rand(outputs, 1, generator=self._generator) - 1)


def in_blocks(
    tensors: dict[str, torch.Tensor], quantized: Collection[str]
) -> dict[str, torch.Tensor]:
    """The same, with some weights as FP8 and a scale for each block (``weight_scale_inv``)."""
    found = {}
    for name, value in tensors.items():
        if name not in quantized:
            found[name] = value
            continue
        rows, columns = value.shape
        padded = torch.nn.functional.pad(value, (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        whole = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
        found[name] = (value / whole).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scale
    return found
