"""``--expert-wise-scale`` of NxDI's own demo, however it is started."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.harness import models, targets
from tests.harness.installed import Environment

OPTION = "--expert-wise-scale"
MODULE = "neuronx_distributed_inference.inference_demo"
CONSOLE_SCRIPT = f"from {MODULE} import main; main()"
"""What the console script ``inference_demo`` of NxDI's installation does."""

WAYS = {
    "python -m": ["-m", MODULE],
    "console script": ["-c", CONSOLE_SCRIPT],
}

every_target = pytest.mark.parametrize("target", list(targets.all_targets()))


def model_type(target: str) -> str:
    """A model that the release's demo knows: that of 0.5 has no Qwen3 MoE."""
    return "mixtral" if target == "0.5" else "qwen3_moe"


def demo(
    environment: Environment, way: str, target: str, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    model = ["--model-type", model_type(target), "--task-type", "causal-lm", "run"]
    return environment.run(*WAYS[way], *model, *arguments, target=target, **variables)


@every_target
def test_option_reaches_the_config_of_a_program(
    installed: Environment, target: str, tmp_path: Path
) -> None:
    """Our quantizer makes the folder only where the config has the flag."""
    save = models.save_mixtral if model_type(target) == "mixtral" else models.save_qwen3_moe
    arguments = [
        *("--model-path", str(save(tmp_path / "model"))),
        *("--compiled-model-path", str(tmp_path / "compiled")),
        *("--prompt", "never run", "--skip-compile", "--compile-only"),
        *("--torch-dtype", "bfloat16", "--batch-size", "1", "--seq-len", "16"),
        *("--max-context-length", "16", "--tp-degree", "1", "--quantized"),
        *("--quantized-checkpoints-path", str(tmp_path / "fp8")),
        *("--quantization-type", "per_channel_symmetric", "--quantization-dtype", "f8e4m3"),
    ]

    result = demo(installed, "python -m", target, *arguments, OPTION, NXDI_PLUGINS="expertscale")

    assert result.returncode == 0, result.stderr
    assert (tmp_path / "fp8" / "nxdi_expertscale.json").is_file()


@every_target
def test_help_of_the_console_script_shows_the_option(installed: Environment, target: str) -> None:
    result = demo(installed, "console script", target, "--help", NXDI_PLUGINS="expertscale")

    assert result.returncode == 0, result.stderr
    assert result.stdout.count(OPTION) == 2


def test_option_is_unknown_where_nothing_is_activated(installed: Environment) -> None:
    result = demo(installed, "python -m", targets.DOUBLE, "--help")

    assert result.returncode == 0, result.stderr
    assert OPTION not in result.stdout
