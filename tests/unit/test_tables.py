"""Tables hold names that are anyone's, and no more of them than people read."""

from __future__ import annotations

import json
from pathlib import Path

from nxdi_expertscale.checkpoint.faults import Fault
from nxdi_expertscale.checkpoint.quantization_error import LayerError
from nxdi_expertscale.checkpoint.verify import Verification
from nxdi_expertscale.cli import output, tables
from nxdi_expertscale.display import results

STEERING = "\x1b[2J\r\n/dst: good \u202e[bold]"


def verification(*, faults: int = 0, layers: int = 0) -> Verification:
    return Verification(
        folder=Path(f"/{STEERING}"),
        faults=tuple(Fault(STEERING, "is wrong") for _ in range(faults)),
        files=1,
        quantized=1,
        layers=tuple(LayerError(str(n), 30.0, STEERING, None) for n in range(layers)),
        warnings=(),
    )


def test_names_cannot_steer_the_terminal_or_fake_a_line() -> None:
    shown = tables.verification_summary(verification(faults=1, layers=1))

    assert "\x1b" not in shown and "\r" not in shown and "\u202e" not in shown
    assert r"\x1b[2J\r\n/dst: good \u202e[bold]: is wrong" in shown
    assert not any(line.startswith("/dst: good") for line in shown.splitlines())


def test_report_is_as_long_as_people_read() -> None:
    shown = tables.verification_summary(verification(faults=100_000, layers=65_536))

    assert "and 99950 more faults; --json lists them all" in shown
    assert "and 65280 more layers; --json lists them all" in shown
    assert len(shown.splitlines()) < 1000


def test_json_is_whole_and_safe() -> None:
    shown = output.to_json(verification(faults=300, layers=1))

    assert len(json.loads(shown)["faults"]) == 300
    assert json.loads(shown)["faults"][0]["where"] == STEERING
    assert "\x1b" not in shown and "\u202e" not in shown


def test_list_of_names_is_one_line() -> None:
    assert results.listed(["a", STEERING]) == r"a, \x1b[2J\r\n/dst: good \u202e[bold]"
    assert results.listed([str(n) for n in range(20_000)]).endswith("and 19992 more")
