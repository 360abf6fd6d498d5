"""Results that show themselves: as one line in a log or at a prompt, as a table in a notebook.

What a result says of itself is said once, as facts and a table, and rendered by whoever shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

from nxdi_expertscale.errors import printable, shorten

MOST_NAMES = 8
"""Names that are listed in a line."""

MOST_LAYERS = 256
"""Layers that a table lists: more than any real model has."""

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: What it shows.
        columns: The heads of its columns. The first holds names, the others numbers.
        rows: The cells of each row.
        names: Which other columns hold names as well.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: frozenset[int] = frozenset()

    def holds_names(self, column: int) -> bool:
        """Whether a column holds names rather than numbers."""
        return column == 0 or column in self.names


class Shown:
    """A result that shows itself.

    A subclass says :meth:`facts`, and :meth:`tables` where they help.
    """

    def facts(self) -> Mapping[str, str]:
        """What it says, by the name of each fact; no more than a line holds."""
        raise NotImplementedError

    def tables(self) -> Sequence[Table]:
        """What it says of each layer, model or seam."""
        return ()

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}: {line(value)}" for name, value in self.facts().items())
        return f"<{type(self).__name__} {facts}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return html_facts(self.facts()) + "".join(map(html_table, self.tables()))


def html_facts(facts: Mapping[str, str]) -> str:
    """Facts as a table of HTML that needs no style sheet."""
    rows = (
        f"<tr>{_html_cell('th', name, is_name=True)}"
        f"{_html_cell('td', line(value), is_name=True)}</tr>"
        for name, value in facts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def html_table(table: Table) -> str:
    """A table as HTML that needs no style sheet."""
    shown, rest = first(table.rows, MOST_LAYERS)
    head = "".join(
        _html_cell("th", column, is_name=table.holds_names(number))
        for number, column in enumerate(table.columns)
    )
    rows = (
        "<tr>"
        + "".join(
            _html_cell("td", line(cell), is_name=table.holds_names(number))
            for number, cell in enumerate(row)
        )
        + "</tr>"
        for row in shown
    )
    more = f"<p>and {rest} more</p>" if rest else ""
    return (
        f"<table><caption>{escape(table.title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{more}"
    )


def _html_cell(kind: str, text: str, *, is_name: bool) -> str:
    align = "left" if is_name else "right"
    return f'<{kind} style="text-align: {align}">{escape(text)}</{kind}>'


def line(text: str) -> str:
    """A text as one line that is safe to print, and not too long."""
    return shorten(printable(text))


def first(items: Sequence[_Row], most: int) -> tuple[Sequence[_Row], int]:
    """The first of some items, and how many are left out."""
    return items[:most], max(0, len(items) - most)


def listed(names: Sequence[str]) -> str:
    """Format names as a list in one line, the first :data:`MOST_NAMES` of them."""
    shown, rest = first(names, MOST_NAMES)
    return ", ".join(map(line, shown)) + (f" and {rest} more" if rest else "")
