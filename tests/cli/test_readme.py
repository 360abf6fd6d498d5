"""The README's ways in, copied and run in an installation of the wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import models, readme, targets
from tests.harness.installed import Environment

every_target = pytest.mark.parametrize("target", list(targets.all_targets()))


@every_target
def test_import(installed: Environment, target: str) -> None:
    block = readme.block("python", "import nxdi_expertscale")

    result = installed.run("-c", f"{block}\nprint(neuron_config.expert_wise_scale)", target=target)

    assert (result.returncode, result.stdout.strip()) == (0, "True"), result.stderr


@every_target
def test_variable(installed: Environment, target: str, tmp_path: Path) -> None:
    """Up to where the compiler is needed: the checkpoint is made, so the flag has arrived."""
    variable, program, *arguments = readme.command("inference_demo --model-type")
    if target == "0.5":
        # Its demo has no Qwen3 MoE.
        save, arguments[arguments.index("qwen3_moe")] = models.save_mixtral, "mixtral"
    else:
        save = models.save_qwen3_moe
    for option, value in {
        "--model-path": save(tmp_path / "model"),
        "--compiled-model-path": tmp_path / "compiled",
        "--quantized-checkpoints-path": tmp_path / "fp8",
        # A process here is one rank.
        "--tp-degree": 1,
        "--seq-len": 16,
        "--max-context-length": 16,
    }.items():
        arguments[arguments.index(option) + 1] = str(value)
    name, _, value = variable.partition("=")

    result = installed.run(
        *("-m", f"neuronx_distributed_inference.{program}", *arguments),
        *("--skip-compile", "--compile-only"),
        target=target,
        **{name: value},
    )

    assert result.returncode == 0, result.stderr
    assert (tmp_path / "fp8" / "nxdi_expertscale.json").is_file()


def test_demo_block_for_a_host_names_commands_that_exist(installed: Environment) -> None:
    for name in ("doctor", "quantize", "neuron-config"):
        program, *arguments = readme.command(f"nxdi-expertscale {name}")

        result = installed.command(*arguments[:1], "--help")

        assert program == "nxdi-expertscale"
        assert result.returncode == 0, result.stderr
