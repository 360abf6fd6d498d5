from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.cli import commands, main
from nxdi_expertscale.evaluation import small_model

CONFIG = small_model.qwen3_moe_config(hidden_size=32, moe_intermediate_size=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """An original and its quantized checkpoint, and the text to measure them on."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "original").mkdir()
    corpus = small_model.Corpus(training="x = 1\n" * 200, held_out="")
    recipe = small_model.Recipe(steps=12, batch=1)
    small_model.make(folder / "original", CONFIG, corpus, recipe)
    quantize_checkpoint(folder / "original", folder / "fp8")
    (folder / "text.txt").write_text("y = 2\n" * 100)
    return [str(folder / "original"), str(folder / "fp8"), "--text", str(folder / "text.txt")]


def test_table_has_both_kinds_of_scales(folders: list[str]) -> None:
    result = CliRunner().invoke(commands.cli, ["evaluate", *folders])

    rows = [line for line in result.stdout.splitlines() if "one per expert" in line]
    assert result.exit_code == 0
    assert len(rows) == 1 and rows[0].count("%") == 4
    assert "one, averaged" in result.stdout
    assert "599 tokens" not in result.stdout and "512 tokens of" in result.stdout


def test_json_is_for_programs(folders: list[str]) -> None:
    result = CliRunner().invoke(commands.cli, ["evaluate", *folders, "--tokens", "64", "--json"])

    figures = json.loads(result.stdout)
    assert figures["tokens"] == 64
    assert set(figures["expert_wise"]["layer_errors"]) == {"0", "1", "2", "3"}


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_picture(name: str, start: bytes, folders: list[str], tmp_path: Path) -> None:
    file = tmp_path / name

    result = CliRunner().invoke(commands.cli, ["evaluate", *folders, "--plot", str(file)])

    assert result.exit_code == 0
    assert file.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "a.gif"], "--plot: a.gif has to end in .png, .pdf or .svg"),
        (["--plot", "no/folder/a.png"], "--plot: no/folder is not a folder"),
        (["--text", "no/text.txt"], "no/text.txt"),
    ],
)
def test_bad_request_is_one_line(
    arguments: list[str],
    message: str,
    folders: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *folders, *arguments])

    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("nxdi-expertscale: ") and error.count("\n") == 1
    assert message in error


def test_missing_matplotlib_is_told_before_anything_is_computed(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", "no-model", "no-model", "--plot", "a.png"])

    assert exit_.value.code == 2
    assert "pip install 'nxdi-expertscale[plot]'" in capsys.readouterr().err
