from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nxdi_expertscale.cli.commands import cli
from nxdi_expertscale.evaluation import demo, small_model


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "RECIPE", small_model.Recipe(steps=12, batch=1))
    monkeypatch.setattr(demo, "TOKENS", 512)
    corpus = small_model.Corpus(training="x = 1\n" * 200, held_out="y = 1\n" * 200)
    monkeypatch.setattr(small_model, "python_library", lambda: corpus)


def test_demo_shows_what_a_shared_scale_costs() -> None:
    result = CliRunner().invoke(cli, ["demo", "--json"])

    figures = json.loads(result.stdout)
    assert result.exit_code == 0
    assert figures["spread"]["perplexity"] == figures["as_trained"]["perplexity"]
    assert max(figures["spread"]["expert_wise"]["layer_errors"].values()) < 0.06
    assert min(figures["spread"]["averaged"]["layer_errors"].values()) > 0.5


def test_demo_says_where_the_picture_is_and_what_to_type_next(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["demo"], env={"COLUMNS": "250"})

    (picture,) = tmp_path.glob("nxdi-expertscale/demo-*/evaluation.png")
    assert str(picture) in result.stdout
    assert "nxdi-expertscale quantize MODEL MODEL-FP8" in result.stdout


def test_without_matplotlib_it_says_what_a_picture_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    result = CliRunner().invoke(cli, ["demo"], env={"COLUMNS": "250"})

    assert result.exit_code == 0
    assert "one per expert" in result.stdout
    assert "pip install 'nxdi-expertscale[plot]'" in result.stdout


def test_model_is_trained_once() -> None:
    runs = [json.loads(CliRunner().invoke(cli, ["demo", "--json"]).stdout) for _ in range(2)]

    assert [run["trained"] for run in runs] == [True, False]
    assert runs[0]["as_trained"]["averaged"] == runs[1]["as_trained"]["averaged"]


def test_training_that_was_cut_off_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(small_model, "spread_experts", cut_off)
        CliRunner().invoke(cli, ["demo", "--json"])

    result = CliRunner().invoke(cli, ["demo", "--json"])

    assert result.exit_code == 0
    assert json.loads(result.stdout)["trained"]
