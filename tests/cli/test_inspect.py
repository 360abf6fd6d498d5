"""``inspect`` and ``neuron-config``, as they are typed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from nxdi_expertscale.checkpoint import inspect_checkpoint, quantize_checkpoint
from nxdi_expertscale.cli import plots
from nxdi_expertscale.cli.commands import cli
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

    plots.draw_heat_map(dataclasses.replace(found, layers=layers), tmp_path / "map.png")

    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
