"""The check of a family that its author runs: right where the model is, wrong with what is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nxdi_expertscale.cli.entry_point import main
from nxdi_expertscale.testing import FamilyCheck, check_family
from nxdi_expertscale.testing.__main__ import check
from tests.harness import checkpoints

pytestmark = pytest.mark.usefixtures("active")

APPLICATION = (
    "neuronx_distributed_inference.models.qwen3_moe.modeling_qwen3_moe:NeuronQwen3MoeForCausalLM"
)


def test_right_model_is_right_in_every_part(nxdi: Any, moe: Path) -> None:
    found = check_family(moe, APPLICATION)

    assert (found.family, found.problems, found.notes) == ("qwen3_moe", (), ())
    assert sorted(found.moe) == ["layers.0.mlp", "layers.1.mlp"]
    assert sorted(found.blocks) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert 0.01 < min(found.moe.values()) < max(found.moe.values()) < 0.06
    assert 0.01 < found.logits_experts_alone < found.logits
    assert len(found.quantized) == 2 * 6 + 1
    assert {name for name, error in found.parameters.items() if error} == set(found.quantized)


def in_blocks(moe: Path, folder: Path) -> Path:
    """The model as block FP8."""
    folder.mkdir()
    config = json.loads((moe / "config.json").read_text())
    config["quantization_config"] = checkpoints.BLOCKS_CONFIG
    (folder / "config.json").write_text(json.dumps(config))
    save_file(checkpoints.in_blocks(checkpoints.load(moe)), folder / "model.safetensors")
    return folder


def test_fp8_checkpoint_is_compared_with_what_it_stands_for_or_with_its_original(
    nxdi: Any, moe: Path, tmp_path: Path
) -> None:
    published = in_blocks(moe, tmp_path / "published")

    dequantized = check_family(published, APPLICATION)
    original = check_family(published, APPLICATION, reference=moe, folder=tmp_path / "fp8")

    assert (dequantized.problems, original.problems) == ((), ())
    worst = "layers.0.mlp.expert_mlps.mlp_op.down_proj.weight"
    assert dequantized.parameters[worst] < original.parameters[worst] < 0.06
    assert (tmp_path / "fp8" / "model.safetensors.index.json").is_file()


def lose_a_scale(state_dict: dict[str, torch.Tensor]) -> None:
    state_dict["layers.1.self_attn.o_proj.scale"].fill_(1.0)


def swap_experts(state_dict: dict[str, torch.Tensor]) -> None:
    name = "layers.0.mlp.expert_mlps.mlp_op.down_proj.scale"
    state_dict[name] = state_dict[name].flip(0)


@pytest.mark.parametrize(
    ("spoil", "parameter", "block"),
    [
        (lose_a_scale, "layers.1.self_attn.o_proj.o_proj.weight", "layers.1.self_attn"),
        (swap_experts, "layers.0.mlp.expert_mlps.mlp_op.down_proj.weight", "layers.0.mlp"),
    ],
)
def test_what_is_wrong_is_named(
    nxdi: Any,
    moe: Path,
    spoil: Callable[[dict[str, torch.Tensor]], None],
    parameter: str,
    block: str,
) -> None:
    class Spoiled(nxdi.application_cls(moe)):  # type: ignore[misc]
        def checkpoint_loader_fn(self, *args: Any, **kwargs: Any) -> Any:
            state_dict = super().checkpoint_loader_fn(*args, **kwargs)
            if self.neuron_config.quantized:
                spoil(state_dict)
            return state_dict

    found = check_family(moe, Spoiled)

    assert [problem.partition(":")[0] for problem in found.problems] == [parameter, block]
    assert "full_precision of the family" in found.problems[0]


def test_program_prints_the_check_and_ends_with_its_answer(
    nxdi: Any,
    moe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*arguments: str) -> tuple[int | str | None, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(moe), "--application", *arguments], check)
        return end.value.code, *capsys.readouterr()

    status, out, _ = run(APPLICATION)
    assert status == 0
    assert "%  layers.*.mlp.expert_mlps.mlp_op.down_proj.weight\n" in out
    assert out.splitlines()[-1].startswith("yes: ")

    monkeypatch.setattr("nxdi_expertscale.testing.check.WITHIN_BLOCK", 0.0)
    status, out, _ = run(APPLICATION, "--json")
    assert status == 1
    assert FamilyCheck(**json.loads(out)).problems[0].startswith("layers.0.mlp: its output is ")

    for name, says in {
        "nowhere:Model": "nowhere:Model: ModuleNotFoundError",
        "json:Model": "json:Model: AttributeError",
        "json": "json: ",
        "json:JSONDecoder": "JSONDecoder: has no get_config_cls",
    }.items():
        status, _, err = run(name)
        assert status == 2
        assert err.startswith(f"nxdi-expertscale: {says}")
        assert len(err.splitlines()) == 1
