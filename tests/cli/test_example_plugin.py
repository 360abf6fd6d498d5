"""A family from a distribution of its own: installed, selected, and taken all the way.

The way is that of CONTRIBUTING.md's "Adding a model": a checkpoint is quantized by the command, and
the check of a family runs the model, on the double and on each release that is at hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nxdi_expertscale.testing import FamilyCheck
from tests.contributions import tiny
from tests.harness import targets
from tests.harness.installed import Environment, build_wheel

EXAMPLE = Path(__file__).parents[1] / "example_plugin"
ALLOWED = "expertscale,heron_moe"
MODEL = "model.language_model"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The package and the example, each installed from its wheel."""
    folder = tmp_path_factory.mktemp("example")
    environment = Environment(folder / "environment")
    for built in (wheel, build_wheel(folder / "wheel", EXAMPLE)):
        environment.pip("install", "--quiet", "--no-deps", str(built))
    environment.add_dependencies()
    return environment


def weights() -> dict[str, torch.Tensor]:
    """Of a model of two layers, as the published ones are laid out."""
    model = tiny.Tiny()
    model.ends(f"{MODEL}.")
    for layer in range(tiny.LAYERS):
        path = f"{MODEL}.layers.{layer}"
        block = f"{path}.feed_forward"
        model.layer_norms(path)
        model.attention(f"{path}.self_attn", norms=tiny.HEAD)
        model.linear(f"{block}.router", tiny.EXPERTS, tiny.HIDDEN)
        model.experts(f"{block}.experts")
        model.feed_forward(f"{block}.shared_expert", tiny.DENSE)
        model.linear(f"{block}.shared_gate", 1, tiny.HIDDEN)
    model.linear("model.visual.patch_embed.proj", tiny.HIDDEN, tiny.HIDDEN)
    return dict(stack(model.tensors))


def stack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with the experts of a layer as one tensor for each fused weight."""
    found = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(tiny.LAYERS):
        path = f"{MODEL}.layers.{layer}.feed_forward.experts"
        gate, up, down = (
            torch.stack([tensors[f"{path}.{n}.{name}.weight"] for n in range(tiny.EXPERTS)])
            for name in tiny.GATED
        )
        found |= {f"{path}.gate_up_proj": torch.cat([gate, up], 1), f"{path}.down_proj": down}
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(weights(), folder / "model.safetensors")
    text = {
        **tiny.COMMON,
        "model_type": "heron_text",
        "moe_intermediate_size": tiny.INNER,
        "shared_expert_intermediate_size": tiny.DENSE,
        "num_experts": tiny.EXPERTS,
        "num_experts_per_tok": tiny.CHOSEN,
        "norm_topk_prob": True,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "heron", "text_config": text}))
    return folder


@pytest.mark.parametrize("target", targets.all_targets())
def test_family_takes_a_checkpoint_all_the_way(
    environment: Environment, checkpoint: Path, tmp_path: Path, target: str
) -> None:
    made = environment.command(
        "quantize", str(checkpoint), str(tmp_path / "fp8"), "--json", NXDI_PLUGINS=ALLOWED
    )
    assert (made.returncode, made.stderr) == (0, "")
    experts = 3 * tiny.EXPERTS * tiny.LAYERS
    assert json.loads(made.stdout)["tensors"]["quantized experts"] == experts

    result = environment.run(
        *("-W", "ignore", "-m", "nxdi_expertscale.testing", str(checkpoint), "--json"),
        *("--application", "modeling_heron:NeuronHeronForCausalLM"),
        target=target,
        NXDI_PLUGINS=ALLOWED,
        PYTHONPATH=str(EXAMPLE / "contribution"),
    )

    assert result.returncode == 0, result.stdout + result.stderr
    found = FamilyCheck(**json.loads(result.stdout))
    assert (found.family, found.problems) == ("heron_moe", [])
    assert sorted(found.moe) == ["layers.0.mlp.moe", "layers.1.mlp.moe"]
    assert max(found.moe.values()) < 0.06
    assert 0 < found.logits_experts_alone < found.logits < 0.12
    assert found.parameters["layers.1.mlp.shared_expert.down_proj.weight"] == 0
    fused = "layers.1.mlp.moe.expert_mlps.mlp_op.gate_up_proj.weight"
    assert fused in found.quantized
    assert 0.01 < found.parameters[fused] < 0.04


@pytest.mark.parametrize("plugins", ["expertscale", ""])
def test_family_that_is_not_allowed_is_not_known(
    environment: Environment, checkpoint: Path, tmp_path: Path, plugins: str
) -> None:
    result = environment.command(
        "quantize", str(checkpoint), str(tmp_path / "fp8"), NXDI_PLUGINS=plugins
    )

    assert result.returncode == 2
    assert "model_type 'heron' is not a mixture-of-experts model" in result.stderr
    assert result.stderr.count("\n") == 1
