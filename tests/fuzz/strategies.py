"""Recipes at random, in the structure of what they spoil."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.fuzz.readers import STARTS

_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00003.safetensors",
    "nxdi_expertscale.json",
    "tokenizer.json",
)
_NAMES = (
    "",
    ".",
    "..",
    "../outside",
    "/etc/passwd",
    "a\0b",
    "x" * 5000,
    "[/red]\x1b[31m\n",
    "config.json",
    "tokenizer.json",
    "model-00001-of-00003.safetensors",
    "model-00001-of-00002.safetensors.record",
    ".nxdi-expertscale",
    "__metadata__",
    "weight",
    ".weight",
    "weight_scale",
    "lm_head.weight",
    "lm_head.weight_scale",
    "lm_head.weight_scale_inv",
    "model.norm.weight_scale",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.experts.0.up_proj.weight",
    "model.layers.0.mlp.experts.00.up_proj.weight",
    "model.layers.0.mlp.experts.٣.up_proj.weight",
    "model.layers.0.mlp.experts.0.up_proj.weight\n",
    "model.layers.7.mlp.experts.9.down_proj.weight",
    f"model.layers.{'9' * 5000}.mlp.experts.0.up_proj.weight",
    "qwen3_moe",
    "mixtral",
    "llama4",
    "fp8",
    "compressed-tensors",
    "F8_E4M3",
    "bfloat16",
)
_KEYS = (
    "model_type",
    "num_experts",
    "num_hidden_layers",
    "hidden_size",
    "moe_intermediate_size",
    "vocab_size",
    "text_config",
    "tie_word_embeddings",
    "torch_dtype",
    "quantization_config",
    "weight_block_size",
    "rope_parameters",
    "mlp_only_layers",
    "weight_map",
    "metadata",
    "dtype",
    "shape",
    "data_offsets",
    "shards",
    "files",
    "source",
    "name",
    "size",
    "source_digests",
    "modules_to_not_convert",
)
_RAW = (
    "NaN",
    "-Infinity",
    "1e999",
    "1" * 5000,
    '"\\ud800"',
    '"\\ud83d\\ude00"',
    "\ud800",
    "{",
    "[1,]",
    "\ufeff{}",
    "'a'",
    "",
)

_names = st.sampled_from(_NAMES) | st.text(max_size=8)
_numbers = st.sampled_from(
    (0, 1, 2, 3, 4, 8, 40, 48, 64, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 10**4000, -1)
) | st.integers(-10, 300)
_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | _numbers | st.floats(allow_nan=False) | _names,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(_KEYS) | _names, inner, max_size=3)
    ),
    max_leaves=6,
)
_file = st.integers(0, 30) | st.sampled_from(_FILES)
_place = st.lists(st.integers(0, 60) | st.sampled_from(_KEYS), min_size=1, max_size=5)
_shape = st.lists(
    st.sampled_from((0, 1, 2, 4, 40, 48, 64, 80, 2**22 + 1, 2**31, 2**62)), max_size=9
)


def _step(kind: str, *rest: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.tuples(st.just(kind), _file, *rest).map(list)


steps = st.one_of(
    _step("set", _place, _values),
    _step("rename", _place, _names),
    _step("tensor", _names, st.sampled_from(("F8_E4M3", "BF16", "F32", "I64", "U8")), _shape),
    _step("drop", _place),
    _step("raw", _place, st.sampled_from(_RAW)),
    _step("nest", _place, st.sampled_from((60, 65, 900, 100_000))),
    _step("twice", _place, _names),
    _step("overwrite", st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8).map(bytes.hex)),
    _step("cut", st.integers(0, 1 << 20)),
    _step("stretch", st.sampled_from((1, 1 << 20, (1 << 40) - 1))),
    _step("length", st.sampled_from((0, 1, 2, 2**20, 2**25, 2**31, 2**63, 2**64 - 1))),
    _step("remove"),
    _step("folder"),
    _step("pipe"),
    _step("link", st.sampled_from(("../outside", "/etc/passwd", "config.json", "loop", "."))),
    _step(
        "copy", st.sampled_from(("again.safetensors", "x.txt", "more.json", "model.safetensors"))
    ),
)

recipes = st.tuples(st.sampled_from(STARTS), st.lists(steps, min_size=1, max_size=4))
