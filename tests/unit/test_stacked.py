"""Experts that are stored as one tensor for a layer: quantized as those stored one by one are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nxdi_expertscale import CheckpointError, quantize_checkpoint
from nxdi_expertscale.checkpoint import verify_checkpoint
from nxdi_expertscale.checkpoint.read import chunks
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.families.declaration import GATE_UP

EXPERTS, HIDDEN, INNER, VOCABULARY = 4, 24, 10, 16
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "num_experts_per_tok": 1,
}
QWEN3_MOE = {
    **SIZES,
    "model_type": "qwen3_moe",
    "num_experts": EXPERTS,
    "moe_intermediate_size": INNER,
}
LLAMA4 = {
    "model_type": "llama4",
    "text_config": {**SIZES, "num_local_experts": EXPERTS, "intermediate_size": INNER},
}

State = dict[str, torch.Tensor]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator)).to(
        dtype
    )


def save(folder: Path, config: dict[str, Any], state: State) -> Path:
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def attention(layer: str) -> State:
    """The attention and the norms of a layer."""
    projections = {f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"}
    norms = {f"{part}_layernorm": (HIDDEN,) for part in ("input", "post_attention")}
    shapes: dict[str, tuple[int, ...]] = {**projections, **norms}
    return {f"{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}


def qwen3_moe(dtype: torch.dtype = torch.bfloat16) -> State:
    """Stacked with the outputs first, as transformers 5 holds a Qwen3 MoE in memory."""
    state = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": random(HIDDEN),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }
    for layer in range(2):
        state |= attention(f"model.layers.{layer}")
        mlp = f"model.layers.{layer}.mlp"
        state[f"{mlp}.gate.weight"] = random(EXPERTS, HIDDEN)
        state[f"{mlp}.experts.gate_up_proj"] = random(EXPERTS, 2 * INNER, HIDDEN, dtype=dtype)
        state[f"{mlp}.experts.down_proj"] = random(EXPERTS, HIDDEN, INNER, dtype=dtype)
    return state


def llama4(dtype: torch.dtype = torch.bfloat16) -> State:
    """Stacked with the inputs first; the first layer has no experts."""
    model = "language_model.model"
    moe = f"{model}.layers.1.feed_forward"
    return {
        f"{model}.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        f"{model}.norm.weight": random(HIDDEN),
        "language_model.lm_head.weight": random(VOCABULARY, HIDDEN),
        "vision_model.patch_embedding.linear.weight": random(HIDDEN, 12),
        **attention(f"{model}.layers.0"),
        **attention(f"{model}.layers.1"),
        f"{model}.layers.0.feed_forward.gate_proj.weight": random(30, HIDDEN),
        f"{moe}.router.weight": random(EXPERTS, HIDDEN),
        f"{moe}.shared_expert.gate_proj.weight": random(INNER, HIDDEN),
        f"{moe}.experts.gate_up_proj": random(EXPERTS, HIDDEN, 2 * INNER, dtype=dtype),
        f"{moe}.experts.down_proj": random(EXPERTS, INNER, HIDDEN, dtype=dtype),
    }


def one_by_one(state: State, *, inputs_first: bool) -> State:
    """The same model with each expert under its own name."""
    apart: State = {}
    for name, tensor in state.items():
        path, _, fused = name.rpartition(".")
        if not path.endswith(".experts"):
            apart[name] = tensor
            continue
        for expert in range(EXPERTS):
            weight = tensor[expert].T if inputs_first else tensor[expert]
            parts = ("gate_proj", "up_proj") if fused == GATE_UP else ("down_proj",)
            for part, values in zip(parts, weight.chunk(len(parts)), strict=True):
                apart[f"{path}.{expert}.{part}.weight"] = values
    return apart


def tensors_of(folder: Path) -> State:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same_bits(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


LAYOUTS = [(QWEN3_MOE, qwen3_moe, False), (LLAMA4, llama4, True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("config", "make", "inputs_first"), LAYOUTS)
@pytest.mark.parametrize("excluded", [(), ("layers.1.{}.experts",)])
def test_equals_experts_one_by_one(
    tmp_path: Path,
    config: dict[str, Any],
    make: Callable[[torch.dtype], State],
    inputs_first: bool,
    dtype: torch.dtype,
    excluded: tuple[str, ...],
) -> None:
    block = "feed_forward" if inputs_first else "mlp"
    names = [name.format(block) for name in excluded]
    stacked = save(tmp_path / "stacked", config, make(dtype))
    apart = save(tmp_path / "apart", config, one_by_one(make(dtype), inputs_first=inputs_first))

    result = quantize_checkpoint(stacked, tmp_path / "fp8", modules_to_not_convert=names)
    quantize_checkpoint(apart, tmp_path / "expected", modules_to_not_convert=names)

    found = tensors_of(tmp_path / "fp8")
    assert same_bits(found, tensors_of(tmp_path / "expected"))
    moe_layers = 1 if inputs_first else 2
    quantized = (moe_layers - len(excluded)) * EXPERTS * 3
    assert result.tensors["quantized experts"] == quantized
    verification = verify_checkpoint(tmp_path / "fp8", against=stacked)
    assert not verification.faults


def test_a_large_expert_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = save(tmp_path / "stacked", LLAMA4, llama4())
    quantize_checkpoint(stacked, tmp_path / "whole")
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 3 * HIDDEN)
    expert = next(weight for weight in open_model(stacked).weights if weight.expert is not None)
    assert len(list(chunks.chunks_of([expert]))) > 1

    quantize_checkpoint(stacked, tmp_path / "chunks")

    assert same_bits(tensors_of(tmp_path / "chunks"), tensors_of(tmp_path / "whole"))


def test_llama4_keeps_what_nxdi_cannot_load_quantized(tmp_path: Path) -> None:
    source = llama4()
    result = quantize_checkpoint(save(tmp_path / "llama4", LLAMA4, source), tmp_path / "fp8")

    found = tensors_of(tmp_path / "fp8")
    for name in (
        "language_model.lm_head.weight",
        "vision_model.patch_embedding.linear.weight",
        "language_model.model.layers.1.feed_forward.shared_expert.gate_proj.weight",
        "language_model.model.layers.1.feed_forward.router.weight",
    ):
        assert torch.equal(found[name], source[name])
    dense = "language_model.model.layers.0.feed_forward.gate_proj"
    assert found[f"{dense}.weight"].dtype == torch.float8_e4m3fn
    assert found[f"{dense}.weight_scale"].shape == (30, 1)
    assert "lm_head" in result.modules_to_not_convert


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1], rf"gate_up_proj: has shape .*config.json says {EXPERTS} experts"),
        (lambda t: t[:, :-1], r"gate_up_proj: has 19 outputs, which are not gate_proj and up_proj"),
        (lambda t: t[:, :-2], r"experts\.0\.gate_proj\.weight: has shape \[9, 24\]"),
        (lambda t: t.to(torch.float8_e4m3fn), r"gate_up_proj: is F8_E4M3, and holds all experts"),
        (lambda t: t.flatten(1), r"gate_up_proj: has shape \[4, 480\]"),
    ],
)
def test_malformed_stack_is_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    state = qwen3_moe()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    state[name] = change(state[name])

    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(save(tmp_path / "bad", QWEN3_MOE, state), tmp_path / "fp8")


def test_expert_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    state = qwen3_moe()
    state["model.layers.1.mlp.experts.2.up_proj.weight"] = random(INNER, HIDDEN)

    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.weight.* as well"):
        quantize_checkpoint(save(tmp_path / "bad", QWEN3_MOE, state), tmp_path / "fp8")
