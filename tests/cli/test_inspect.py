"""``inspect`` and ``neuron-config``, as they are typed."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from click.testing import CliRunner

from nxdi_expertscale.checkpoint import inspect_checkpoint, quantize_checkpoint
from nxdi_expertscale.cli import plots
from nxdi_expertscale.cli.commands import cli
from nxdi_expertscale.errors import ConfigurationError
from tests.harness import checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An original, and its quantized checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    source = checkpoints.save(folder / "source")
    quantize_checkpoint(source, folder / "fp8", modules_to_not_convert=["layers.0.mlp.experts"])
    return source, folder / "fp8"


def test_inspect_names_the_model_and_shows_every_layer(folders: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(folders[0])])

    assert result.exit_code == 0
    assert "qwen3_moe" in result.stdout
    assert "full precision" in result.stdout
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if "%" in line]
    assert [row[0].strip() for row in rows] == [str(i) for i in range(checkpoints.LAYERS)]
    assert all(float(row[1]) >= 1 for row in rows)


def test_inspect_says_who_made_a_quantized_checkpoint(folders: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(folders[1]), "--json"])

    assert result.exit_code == 0
    assert json.loads(result.stdout)["made_by"]


def test_inspect_draws_a_picture(folders: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "map.png"

    result = CliRunner().invoke(cli, ["inspect", str(folders[0]), "--plot", str(file)])

    assert result.exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_neuron_config_has_the_exclusions_under_both_names(folders: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(cli, ["neuron-config", str(folders[1]), "--tp-degree", "4"])

    settings = json.loads(result.stdout)
    excluded = set(settings["override_neuron_config"]["modules_to_not_convert"])
    assert settings["neuron_config"]["tp_degree"] == 4
    assert {"layers.0.mlp.experts", "layers.0.mlp.expert_mlps"} <= excluded


def test_neuron_config_is_vllms_command_line(folders: tuple[Path, Path]) -> None:
    sizes = ["--tp-degree", "4", "--batch-size", "8", "--seq-len", "512"]

    result = CliRunner().invoke(cli, ["neuron-config", str(folders[1]), "--format", "vllm", *sizes])

    (line,) = result.stdout.splitlines()
    *command, override = shlex.split(line)
    assert command == [
        *("vllm", "serve", str(folders[1]), "--tensor-parallel-size", "4"),
        *("--max-model-len", "512", "--max-num-seqs", "8", "--no-enable-prefix-caching"),
        "--additional-config",
    ]
    plain = CliRunner().invoke(cli, ["neuron-config", str(folders[1]), *sizes])
    settings = json.loads(plain.stdout)["override_neuron_config"]
    assert json.loads(override) == {"override_neuron_config": settings}


def test_neuron_config_names_the_model_that_it_is_told_to(folders: tuple[Path, Path]) -> None:
    arguments = ["neuron-config", str(folders[1]), "--format", "vllm", "--model", "a model's"]

    result = CliRunner().invoke(cli, arguments)

    assert shlex.split(result.stdout)[:3] == ["vllm", "serve", "a model's"]


def test_neuron_config_is_python_for_nxdi(folders: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(
        cli, ["neuron-config", str(folders[1]), "--format", "nxdi", "--seq-len", "128"]
    )

    found: dict[str, Any] = {}
    config = ModuleType("neuronx_distributed_inference.models.config")
    config.MoENeuronConfig = dict  # type: ignore[attr-defined]
    adapter = ModuleType("neuronx_distributed_inference.utils.hf_adapter")
    adapter.load_pretrained_config = str  # type: ignore[attr-defined]
    stubs = {module.__name__: module for module in (config, adapter)}
    packages = {name.rpartition(".")[0]: ModuleType("") for name in stubs}
    packages["neuronx_distributed_inference"] = ModuleType("")
    with mock.patch.dict(sys.modules, {**packages, **stubs}):
        exec(result.stdout, found)
    plain = CliRunner().invoke(cli, ["neuron-config", str(folders[1]), "--seq-len", "128"])
    assert found["neuron_config"] == json.loads(plain.stdout)["neuron_config"]
    assert found["load_config"] == str(folders[1])


@pytest.mark.parametrize("command", ["inspect", "neuron-config"])
def test_folder_that_is_no_checkpoint_is_refused(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, [command, str(tmp_path)])

    assert result.exit_code != 0
    assert str(tmp_path) in str(result.exception)


@pytest.mark.parametrize("name", ["$x_{$", "a\nb\x1b[2J", "x" * 200])
def test_picture_of_a_folder_with_any_name(
    name: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[0], tmp_path / name)
    file = tmp_path / "map.svg"

    result = CliRunner().invoke(cli, ["inspect", str(folder), "--plot", str(file)])

    assert result.exit_code == 0
    assert file.read_bytes().startswith(b"<?xml")
    assert "\x1b" not in result.stdout


def test_picture_of_more_layers_than_any_model_has(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    found = inspect_checkpoint(folders[0])
    layers = tuple(dataclasses.replace(found.layers[0], layer=n) for n in range(3_000))

    plots.save(plots.heat_map(dataclasses.replace(found, layers=layers)), tmp_path / "map.png")

    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint of a model with more heads of queries than of keys."""
    folder = tmp_path_factory.mktemp("grouped")
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    source = checkpoints.save(folder / "source", config=config)
    return quantize_checkpoint(source, folder / "fp8").destination


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tp-degree", "3"], "tp_degree=3 for 4 heads with 2 heads of keys and values"),
        (["--tp-degree", "3", "--format", "nxdi"], "use a tp_degree that divides 2"),
        (["--tp-degree", "8", "--format", "vllm"], "--tp-degree 8 for 4 heads: vLLM takes degrees"),
        (["--moe-ep-degree", "2"], "set tp_degree to a multiple of 2 as well"),
        (["--moe-ep-degree", "2", "--tp-degree", "3"], "set tp_degree to a multiple of 2"),
        (["--moe-ep-degree", "3", "--tp-degree", "6"], "does not divide a layer's 4 experts"),
        (
            ["--moe-ep-degree", "2", "--tp-degree", "2", "--batch-size", "1"],
            "token generation with 1 x 1 tokens and 2 of 4 experts per token chooses 2 experts",
        ),
    ],
    ids=" ".join,
)
def test_neuron_config_that_cannot_work_is_refused(
    arguments: list[str] | str, says: str, grouped: Path
) -> None:
    result = CliRunner().invoke(cli, ["neuron-config", str(grouped), *arguments])

    assert isinstance(result.exception, ConfigurationError)
    assert says in str(result.exception)
    assert result.stdout == ""


@pytest.mark.parametrize("degree", ["1", "2", "4", "8"])
def test_neuron_config_takes_what_works(degree: str, grouped: Path) -> None:
    result = CliRunner().invoke(cli, ["neuron-config", str(grouped), "--tp-degree", degree])

    assert result.exit_code == 0


@pytest.mark.parametrize("form", ["json", "vllm", "nxdi"])
def test_neuron_config_spreads_the_experts_in_every_form(form: str, grouped: Path) -> None:
    sizes = ["--tp-degree", "4", "--moe-ep-degree", "2", "--batch-size", "8"]

    result = CliRunner().invoke(cli, ["neuron-config", str(grouped), "--format", form, *sizes])

    # NxDI multiplies the two.
    assert re.search(r"moe_ep_degree\W+2\b", result.stdout)
    assert re.search(r"moe_tp_degree\W+2\b", result.stdout)


def test_model_that_nxdi_computes_wrongly_gets_no_settings(tmp_path: Path) -> None:
    source = checkpoints.save(tmp_path / "source", config={"norm_topk_prob": False})
    fp8 = quantize_checkpoint(source, tmp_path / "fp8").destination

    result = CliRunner().invoke(cli, ["neuron-config", str(fp8)])

    assert isinstance(result.exception, ConfigurationError)
    assert "NxDI ignores norm_topk_prob=false" in str(result.exception)
