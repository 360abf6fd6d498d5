"""The README's support table, written and read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.upstream import support_table
from tests.upstream.support_table import BEGIN, END, ROWS, Cell


def all_cells() -> support_table.Cells:
    refused = Cell("refused", message="batch too small; use 4")
    kinds = [Cell("runs", error=0.042), refused, Cell("not in this release")]
    return {
        (release, row): kinds[number % len(kinds)]
        for release in ("0.8", "0.9")
        for number, row in enumerate(ROWS)
    }


def test_table_is_read_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    cells = all_cells()
    readme.write_text(f"before\n{BEGIN}\n{support_table.render(cells)}\n{END}\n| after |\n")
    monkeypatch.setattr(support_table, "README", readme)

    assert support_table.in_readme() == cells


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (Cell("runs", error=0.0415), True),
        (Cell("runs", error=0.05), False),
        (Cell("refused", message="no"), False),
    ],
)
def test_only_the_last_digit_of_an_error_may_differ(other: Cell, same: bool) -> None:
    assert Cell("runs", error=0.042).says_the_same_as(other) is same


def test_message_of_a_refusal_counts() -> None:
    assert not Cell("refused", message="one").says_the_same_as(Cell("refused", message="two"))


def test_readme_has_a_place_for_the_table() -> None:
    text = support_table.README.read_text(encoding="utf-8")

    assert text.count(BEGIN) == text.count(END) == 1
