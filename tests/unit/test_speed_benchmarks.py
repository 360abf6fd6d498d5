"""The benchmarks that need no NxDI, on what takes a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import commands, evaluating, quantize, reading, scale, speed
from nxdi_expertscale.checkpoint import quantize_checkpoint
from tests.harness import checkpoints, targets


def test_reading_is_measured_beside_a_plain_read(tmp_path: Path) -> None:
    source, quantized = checkpoints.save(tmp_path / "source"), tmp_path / "fp8"
    quantize_checkpoint(source, quantized)

    found = reading.measure(source, quantized, repeat=1)

    assert all(item.rate > 0 and item.times_a_plain_read > 0 for item in found)
    by_name = {item.name: item.nbytes for item in found}
    assert by_name["verify DST --against SRC"] == by_name["inspect DST"] + by_name["inspect SRC"]
    assert reading.table(found, "title").row_count == len(found)


def test_commands_are_timed_as_processes() -> None:
    assert commands.milliseconds(commands.COMMANDS["python -c pass"], runs=1) > 0


def test_all_benchmarks_of_speed_are_files(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(speed.__file__).parents[1]
    monkeypatch.delenv(targets.UPSTREAM_VARIABLE, raising=False)
    without = speed.steps("0.9")
    monkeypatch.setenv(targets.UPSTREAM_VARIABLE, str(root))
    monkeypatch.setattr(targets, "all_targets", lambda: {"0.9": None})
    everything = speed.steps("0.9")

    assert without.keys() < everything.keys()
    for arguments in everything.values():
        name = arguments[1].replace(".", "/") + ".py" if arguments[0] == "-m" else arguments[0]
        assert (root / name).is_file()


def test_report_says_which_benchmark_failed(tmp_path: Path) -> None:
    chosen = {"Good": ["-c", "print('a table')"], "Bad": ["-c", "raise SystemExit(3)"]}

    found = list(speed.report(chosen, tmp_path))

    assert "cores" in found[0]
    assert found[1].endswith("a table")
    assert found[2].endswith("failed with status 3")


def test_an_earlier_state_is_measured_beside_this_one(tmp_path: Path) -> None:
    before = tmp_path / "before"
    (before / "benchmarks").mkdir(parents=True)
    (before / "benchmarks" / "old.py").touch()
    chosen = {
        "A": ["-m", "benchmarks.quantize"],
        "B": ["-m", "benchmarks.old"],
        "C": ["-m", "benchmarks.new"],
    }

    found = list(speed.with_before(chosen, tmp_path, before))

    assert found == [
        ("A", ["-m", "benchmarks.quantize", "--before", str(before)], tmp_path),
        ("B", ["-m", "benchmarks.old"], tmp_path),
        ("B, before", ["-m", "benchmarks.old"], before),
        ("C", ["-m", "benchmarks.new"], tmp_path),
    ]


def test_a_slow_python_ends_what_more_cores_give() -> None:
    quick, slow = scale.render_cores(1e-9), scale.render_cores(1.0)

    assert "Python's lock" not in quick
    assert slow.count("Python's lock") == len(scale.CORES)


def test_evaluating_is_measured_beside_a_plain_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HIDDEN": 16, "INNER": 16, "EXPERTS": 16, "VOCABULARY": 256}.items():
        monkeypatch.setattr(quantize, name, value)

    found = evaluating.measure([quantize.REPOSITORY], 32, is_busy=False)

    assert [min(values["seconds"] for values in found.values()) > 0, len(found)] == [True, 2]
    assert evaluating.table(found, "title").row_count == len(found)
