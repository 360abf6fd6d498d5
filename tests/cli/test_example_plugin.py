"""A family from a distribution of its own: installed, selected, and taken all the way.

The way is that of CONTRIBUTING.md's "Adding a model": a checkpoint is quantized by the command,
and its state dict goes through the converter that the family names.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.harness.installed import Environment, build_wheel
from tests.harness.targets import DOUBLE

EXAMPLE = Path(__file__).parents[1] / "example_plugin"
EXPERTS, HIDDEN, INNER, VOCABULARY = 4, 24, 10, 16

CONVERTED = """
import json, sys, types
import torch
sys.path.insert(0, sys.argv[2])
import nxdi_expertscale
from neuronx_distributed_inference.models.application_base import load_state_dict
from neuronx_distributed_inference.models.config import InferenceConfig, MoENeuronConfig
from modeling_qwen35 import NeuronQwen35ForCausalLM

settings = MoENeuronConfig(
    batch_size=1, seq_len=16, quantized=True, quantized_checkpoints_path=sys.argv[1],
    quantization_type="per_channel_symmetric", quantization_dtype="f8e4m3",
    expert_wise_scale=True,
)
config = InferenceConfig(
    settings, model_type="qwen3_5_moe_text", num_hidden_layers=1, num_experts=4,
    num_experts_per_tok=1, moe_intermediate_size=10,
)
state_dict = {
    name.removeprefix("model.").replace(".weight_scale", ".scale"): tensor
    for name, tensor in load_state_dict(sys.argv[1]).items()
}
converted = NeuronQwen35ForCausalLM.convert_hf_to_neuron_state_dict(state_dict, config)
torch.save(converted, sys.argv[3])
print(json.dumps({seam.seam: str(seam.state) for seam in nxdi_expertscale.status()}))
"""


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The package and the example, each installed from its wheel."""
    folder = tmp_path_factory.mktemp("example")
    environment = Environment(folder / "environment")
    for built in (wheel, build_wheel(folder / "wheel", EXAMPLE)):
        environment.pip("install", "--quiet", "--no-deps", str(built))
    environment.add_dependencies()
    return environment


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model of one layer, as the published ones are laid out."""
    generator = torch.Generator().manual_seed(0)
    attention = "model.language_model.layers.0.self_attn"
    model = "model.language_model"
    shapes = {
        f"{model}.embed_tokens.weight": (VOCABULARY, HIDDEN),
        f"{model}.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        **{f"{attention}.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkv"},
        f"{model}.layers.0.mlp.gate.weight": (EXPERTS, HIDDEN),
        f"{model}.layers.0.mlp.experts.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN),
        f"{model}.layers.0.mlp.experts.down_proj": (EXPERTS, HIDDEN, INNER),
        f"{model}.layers.0.mlp.shared_expert.down_proj.weight": (HIDDEN, INNER),
        "model.visual.patch_embed.proj.weight": (HIDDEN, HIDDEN),
    }
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    text = {
        "model_type": "qwen3_5_moe_text",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 1,
        "vocab_size": VOCABULARY,
    }
    config = {"model_type": "qwen3_5_moe", "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_family_takes_a_checkpoint_all_the_way(
    environment: Environment, checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    quantized, saved = tmp_path / "fp8", tmp_path / "converted.pt"
    plugins = "expertscale,qwen3_5_moe"
    made = environment.command(
        "quantize", str(checkpoint), str(quantized), "--json", NXDI_PLUGINS=plugins
    )
    assert (made.returncode, made.stderr) == (0, "")
    assert json.loads(made.stdout)["tensors"]["quantized experts"] == 3 * EXPERTS

    contribution = str(EXAMPLE / "contribution")
    arguments = ("-W", "ignore", "-c", CONVERTED, str(quantized), contribution, str(saved))
    result = environment.run(*arguments, target=DOUBLE, NXDI_PLUGINS=plugins)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["state_dict:qwen3_5_moe"] == "applied"

    converted = torch.load(saved)
    original = load_file(checkpoint / "model.safetensors")
    for name, outputs in (("gate_up_proj", 2 * INNER), ("down_proj", HIDDEN)):
        fused = f"layers.0.mlp.moe.expert_mlps.mlp_op.{name}"
        weight, scale = converted[f"{fused}.weight"], converted[f"{fused}.scale"]
        assert weight.dtype == torch.float8_e4m3fn
        assert scale.shape == (EXPERTS, 1, outputs)
        expected = original[f"model.language_model.layers.0.mlp.experts.{name}"].transpose(1, 2)
        torch.testing.assert_close(weight.float() * scale, expected, rtol=0.07, atol=1e-2)
    assert converted["layers.0.self_attn.Wqkv.scale"].shape == (3 * HIDDEN, 1)
    kept = "mlp.shared_expert.down_proj.weight"
    assert torch.equal(
        converted[f"layers.0.{kept}"], original[f"model.language_model.layers.0.{kept}"]
    )


@pytest.mark.parametrize("plugins", ["expertscale", ""])
def test_family_that_is_not_allowed_is_not_known(
    environment: Environment, checkpoint: Path, tmp_path: Path, plugins: str
) -> None:
    result = environment.command(
        "quantize", str(checkpoint), str(tmp_path / "fp8"), NXDI_PLUGINS=plugins
    )

    assert result.returncode == 2
    assert "model_type 'qwen3_5_moe' is not a mixture-of-experts model" in result.stderr
    assert result.stderr.count("\n") == 1
