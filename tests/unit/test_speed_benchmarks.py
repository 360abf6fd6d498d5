"""The benchmarks that need no NxDI, on what takes a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import commands, reading, speed
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
