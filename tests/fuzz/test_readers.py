"""However a checkpoint is spoilt: it is refused with an error of ours, or read and right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.readers import STARTS, try_recipe
from tests.fuzz.recipes import Step
from tests.fuzz.strategies import recipes

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))


@pytest.mark.parametrize("start", STARTS)
def test_good_folders_are_read(start: str) -> None:
    assert try_recipe(start, [])


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_recipes_that_broke_something(path: Path) -> None:
    for start, steps in json.loads(path.read_text()):
        try_recipe(start, steps)


# The same recipes each time; ``tox -e fuzz`` looks for new ones.
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(recipes)
def test_recipes_at_random(recipe: tuple[str, list[Step]]) -> None:
    try_recipe(*recipe)
