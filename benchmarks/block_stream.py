"""Quantizing a block-FP8 checkpoint of DeepSeek-V3's widths, beside a plain copy of it.

    python -m benchmarks.block_stream [--gigabytes 10] [--folder FOLDER]

The checkpoint has as many whole layers of 256 experts as make the size, and one at least (11 GB).
Each step is a process of its own on the same files, and writes to the same disk; the working folder
takes twice the size. Memory is the process's peak; what is mapped or cached of files is in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.quantize import COPY, OURS, PEAK, run

HIDDEN, INNER, EXPERTS, VOCABULARY, BLOCK = 7168, 2048, 256, 8192, 128
LAYER_BYTES = 3 * EXPERTS * HIDDEN * INNER
SHARD_BYTES = 1_500_000_000

_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": HIDDEN,
    "intermediate_size": 18432,
    "moe_intermediate_size": INNER,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 0,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
}

_ATTENTION = {
    "q_a_proj": (1536, HIDDEN),
    "q_b_proj": (128 * 192, 1536),
    "kv_a_proj_with_mqa": (576, HIDDEN),
    "kv_b_proj": (128 * 256, 512),
    "o_proj": (HIDDEN, 128 * 128),
}

Tensors = dict[str, torch.Tensor]


class _Numbers:
    """FP8 numbers that are quick to make, and differ between tensors."""

    def __init__(self) -> None:
        normal = torch.randn(INNER * HIDDEN, generator=torch.Generator().manual_seed(0))
        self._fp8 = (normal * 100).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        self._next = 0

    def linear(self, path: str, rows: int, columns: int) -> Tensors:
        """A weight ``[rows, columns]`` in FP8, and a float32 scale for each block of it."""
        self._next += 1
        count = rows * columns
        repeats = -(-count // self._fp8.numel())
        codes = self._fp8.roll(self._next).repeat(repeats)[:count].view(rows, columns)
        blocks = (math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))
        scale = torch.linspace(1e-5, 2e-4, math.prod(blocks)).view(blocks) * 2.0 ** (self._next % 5)
        return {
            f"{path}.weight": codes.view(torch.float8_e4m3fn),
            f"{path}.weight_scale_inv": scale,
        }


def _parts(layers: int) -> Iterator[Tensors]:
    """The tensors of the model, some at a time."""
    numbers = _Numbers()

    def plain(*shape: int) -> torch.Tensor:
        return (torch.arange(math.prod(shape)) % 251 / 5000 - 0.02).view(shape).bfloat16()

    yield {"model.embed_tokens.weight": plain(VOCABULARY, HIDDEN)}
    for layer in range(layers):
        path = f"model.layers.{layer}"
        yield {
            f"{path}.input_layernorm.weight": plain(HIDDEN),
            f"{path}.post_attention_layernorm.weight": plain(HIDDEN),
            f"{path}.self_attn.q_a_layernorm.weight": plain(1536),
            f"{path}.self_attn.kv_a_layernorm.weight": plain(512),
            f"{path}.mlp.gate.weight": plain(EXPERTS, HIDDEN),
            f"{path}.mlp.gate.e_score_correction_bias": plain(EXPERTS).float(),
        }
        for name, (rows, columns) in _ATTENTION.items():
            yield numbers.linear(f"{path}.self_attn.{name}", rows, columns)
        experts = [f"experts.{number}" for number in range(EXPERTS)]
        for expert in ("shared_experts", *experts):
            yield numbers.linear(f"{path}.mlp.{expert}.gate_proj", INNER, HIDDEN)
            yield numbers.linear(f"{path}.mlp.{expert}.up_proj", INNER, HIDDEN)
            yield numbers.linear(f"{path}.mlp.{expert}.down_proj", HIDDEN, INNER)
    yield {"model.norm.weight": plain(HIDDEN), "lm_head.weight": plain(VOCABULARY, HIDDEN)}


def _shards(layers: int) -> Iterator[Tensors]:
    shard: Tensors = {}
    for part in _parts(layers):
        shard |= part
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    yield shard


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint; the bytes of its weights."""
    layers = max(1, round(gigabytes * 1e9 / LAYER_BYTES))
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(layers)):
        file = f"model-{number + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**_CONFIG, "num_hidden_layers": layers}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the input")
    parser.add_argument("--folder", help="where to work; needs twice the size of the input")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, output = Path(folder, "source"), Path(folder, "output")
        nbytes = make_checkpoint(source, arguments.gigabytes)
        print(f"{nbytes / 1e9:.2f} GB of block FP8; load {os.getloadavg()[0]:.1f}", flush=True)
        for name, code in {"plain copy": COPY, "quantize": OURS}.items():
            measured = run([sys.executable, "-c", code + PEAK, str(source), str(output)])
            rate = nbytes / 1e9 / measured.step_seconds
            print(
                f"{name:12}{measured.step_seconds:8.1f} s{rate:8.2f} GB/s"
                f"{measured.peak_megabytes:8.0f} MB",
                flush=True,
            )
            shutil.rmtree(output)


if __name__ == "__main__":
    main()
