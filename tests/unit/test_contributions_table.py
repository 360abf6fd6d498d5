"""The README's table of contributed models has the models that are run, and nobody's own words."""

from __future__ import annotations

import dataclasses

from tests.contributions import table
from tests.contributions.models import ALL


def test_the_readmes_table_is_what_a_run_writes() -> None:
    rows = table.in_readme()

    assert list(rows) == [model.key for model in ALL]
    assert table.render(rows) == table.drawn(), "run python -m tests.contributions.table"


def test_errors_are_held_to_the_readmes() -> None:
    known = table.Errors(0.04, 0.06, 0.02)

    assert known.is_within(known)
    assert dataclasses.replace(known, logits=0.061).is_within(known)
    assert not dataclasses.replace(known, logits=0.063).is_within(known)
    assert not dataclasses.replace(known, blocks=0.97).is_within(known)
