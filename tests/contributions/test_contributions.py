"""Each contributed model through its own application, on each release that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contributions import running, table
from tests.contributions.models import ALL
from tests.harness import processes, targets

Record = Callable[[str, object], None]

CASES = [
    (model.key, release)
    for model in ALL
    for release in model.releases
    if release in targets.all_targets()
]


def prepare(_folder: Path) -> None:
    """Nothing: what a contribution needs is imported with it."""


@pytest.mark.parametrize(("key", "release"), CASES, ids=map("-".join, CASES))
def test_contributed_model_is_right(
    key: str, release: str, tmp_path: Path, record_property: Record
) -> None:
    sources = running.sources()
    if sources is None or not (sources / key).is_dir():
        pytest.skip(f"{running.VARIABLE} names no folder with {key}")
    target = targets.all_targets()[release]

    found = processes.run_alone(
        target, prepare, tmp_path, running.run, key, sources, tmp_path / "models"
    )

    errors = table.Errors(max(found.moe.values()), found.logits, found.logits_experts_alone)
    record_property(table.PROPERTY, table.to_property(key, errors))
    assert found.problems == ()
    if not table.being_written():
        assert errors.is_within(table.in_readme()[key]), "run python -m tests.contributions.table"
