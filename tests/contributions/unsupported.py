"""Holds what is said of unsupported contributions to their code: converters given FP8 experts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nxdi_expertscale.families.unsupported import UNSUPPORTED, UnsupportedModel
from tests.contributions.tiny import GATED

EXPERTS, HIDDEN, INNER = 2, 8, 6

_MAIN = "refs/heads/main"
_PULL_REQUEST = "pull request "

CONTRIBUTED: Mapping[str, UnsupportedModel] = {
    model.model_types[0]: model for model in UNSUPPORTED if model.where
}


@dataclass(frozen=True)
class Place:
    """Where a file is.

    Attributes:
        ref: The commit or pull request of NxDI's repository.
        folder: The contribution's folder there.
        file: The file's path within the folder.
    """

    ref: str
    folder: str
    file: str


def place_of(model: UnsupportedModel) -> Place:
    """Where the code of an unsupported contribution is."""
    pull_request, _, path = model.where.rpartition(", ")
    number = pull_request.removeprefix(_PULL_REQUEST)
    folder, _, file = path.partition("/src/")
    return Place(f"refs/pull/{number}/head" if number else _MAIN, folder, f"src/{file}")


def _experts(path: str, names: tuple[str, str, str]) -> dict[str, torch.Tensor]:
    """Of a layer, in FP8 and with scales as NxDI gives them to a converter."""
    gate, up, down = names
    shapes = {gate: (INNER, HIDDEN), up: (INNER, HIDDEN), down: (HIDDEN, INNER)}
    found = {}
    for expert in range(EXPERTS):
        for name, shape in shapes.items():
            found[f"{path}.{expert}.{name}.weight"] = torch.ones(shape, dtype=torch.float8_e4m3fn)
            found[f"{path}.{expert}.{name}.scale"] = torch.full((shape[0], 1), 0.5)
    return found


def _config() -> Any:
    neuron_config = SimpleNamespace(
        torch_dtype=torch.bfloat16,
        tp_degree=1,
        fused_qkv=False,
        quantized=True,
        moe_fused_nki_kernel_enabled=False,
        lm_head_pad=False,
        lm_head_pad_alignment_size=1,
        logical_nc_config=1,
        vocab_parallel=False,
    )
    fields = {
        "neuron_config": neuron_config,
        "num_hidden_layers": 1,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "intermediate_size": INNER,
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": 16,
        "first_k_dense_replace": 0,
        "num_dense_layers": 0,
        "mlp_layer_types": ["sparse"],
        "moe_layer_freq": [1],
        "dense_intermediate_size": INNER,
        "quantization_config": None,
    }
    return SimpleNamespace(**fields)


_OF_MLP = ("layers.0.mlp.experts", GATED)
_OF_BLOCK = ("layers.0.block_sparse_moe.experts", ("w1", "w3", "w2"))

CONVERTERS: Mapping[str, tuple[str, tuple[str, tuple[str, str, str]]]] = {
    "glm_moe_dsa": ("NeuronGLM5ForCausalLM.convert_hf_to_neuron_state_dict", _OF_MLP),
    "afmoe": ("NeuronTrinityForCausalLM.convert_hf_to_neuron_state_dict", _OF_MLP),
    "phimoe": ("convert_phi35_moe_hf_to_neuron_state_dict", _OF_BLOCK),
    "laguna": ("NeuronLagunaForCausalLM.convert_hf_to_neuron_state_dict", _OF_MLP),
    "minimax_m3": ("convert_minimax_m3_hf_to_neuron_state_dict", _OF_BLOCK),
}


def convert(model_type: str, file: Path) -> dict[str, torch.Tensor]:
    """What the contribution makes of a layer's FP8 experts.

    Args:
        model_type: A key of :data:`CONVERTERS`.
        file: Its file.
    """
    sys.path.insert(0, str(file.parent))
    found: Any = importlib.import_module(file.stem)
    name, (path, names) = CONVERTERS[model_type]
    for part in name.split("."):
        found = getattr(found, part)
    state_dict = _experts(path, names)
    converted: dict[str, torch.Tensor] = found(state_dict, _config())
    return converted
