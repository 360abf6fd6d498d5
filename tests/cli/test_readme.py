"""The README's roads, copied and run in an installation of the wheel."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from nxdi_expertscale.evaluation import small_model
from tests.harness import models, readme, targets
from tests.harness.installed import Environment, run

MODEL = "Qwen3-30B-A3B"

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


def test_first_command_is_the_one_that_anyone_can_try() -> None:
    first = readme.blocks("bash")[0]

    assert first == (
        "python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 '.[evaluate]' "
        "&& .venv/bin/nxdi-expertscale demo\n"
    )


def test_demo_block_for_a_host_names_commands_that_exist(installed: Environment) -> None:
    for name in ("doctor", "quantize", "neuron-config"):
        program, *arguments = readme.command(f"nxdi-expertscale {name}")

        result = installed.command(*arguments[:1], "--help")

        assert program == "nxdi-expertscale"
        assert result.returncode == 0, result.stderr


def test_commands_of_the_roads_on_a_small_model(installed: Environment, tmp_path: Path) -> None:
    """As they stand, one after the other, in a folder that holds a model of that name."""
    corpus = small_model.Corpus(training="x = 1\n" * 200, held_out="")
    (tmp_path / MODEL).mkdir()
    config = small_model.qwen3_moe_config(hidden_size=32, moe_intermediate_size=16)
    small_model.make(tmp_path / MODEL, config, corpus, small_model.Recipe(steps=2, batch=1))
    lines = [
        line
        for containing in ("nxdi-expertscale doctor", "nxdi-expertscale evaluate")
        for line in readme.block("bash", containing).splitlines()
        # What is installed, and what lies on the hub, is not for here.
        if line.startswith("nxdi-expertscale") and "doctor" not in line
    ]
    assert len(lines) == 5

    for line in lines:
        path = f"{installed.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        result = run(["bash", "-c", f"cd {shlex.quote(str(tmp_path))} && {line}"], {"PATH": path})
        if "neuron-config" in line:
            served = shlex.split(result.stdout)
    written = shlex.split(readme.block("bash", "vllm serve"))
    # The same settings of vLLM; the model is the FP8 folder, which need not lie here.
    assert served[:2] == written[:2]
    assert served[3:-1] == [word for word in written[3:-1] if word.strip()]
    settings = json.loads(served[-1])["override_neuron_config"]
    assert (
        settings.items()
        >= {
            **readme.vllm_override(),
            "quantized_checkpoints_path": str(tmp_path / f"{MODEL}-FP8"),
        }.items()
    )


def test_request_is_one_that_a_server_reads() -> None:
    program, *arguments = shlex.split(readme.block("bash", "curl").replace("\\\n", " "))

    assert program == "curl"
    assert json.loads(arguments[arguments.index("-d") + 1])["model"] == MODEL
