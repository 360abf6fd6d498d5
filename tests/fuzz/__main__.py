"""Look for recipes that break a reader, for as long as it is told.

    python -m tests.fuzz [--minutes 20] [--seed 0] [--atheris]

What is found is made as small as it can be and kept in ``corpus``, where every run of the tests
tries it again. With ``--atheris`` the choices are guided by the branches that were reached, which
takes the package of that name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

CORPUS = Path(__file__).parent / "corpus"
ROUND = 100
"""Recipes that are tried with one seed."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="be guided by coverage")
    options = parser.parse_args()
    if options.atheris:
        _guided(options.minutes, options.seed)
    else:
        _unguided(options.minutes, options.seed)


def _unguided(minutes: float, first_seed: int) -> None:
    from tests.fuzz.readers import try_recipe
    from tests.fuzz.strategies import recipes

    tried: Counter[str] = Counter()
    last: list[Any] = []

    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(recipes)
    def one(recipe: Any) -> None:
        last[:] = recipe
        tried["read" if try_recipe(*recipe) else "refused"] += 1

    deadline, number = time.monotonic() + 60 * minutes, first_seed
    while time.monotonic() < deadline:
        try:
            seed(number)(one)()
        except BaseException:
            # The smallest one is tried last.
            text = json.dumps([last])
            path = CORPUS / f"found-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
            path.write_text(text + "\n")
            print(f"{path}: breaks a reader")
            raise
        number += 1
        print(f"{dict(tried)} of {sum(tried.values())} recipes, seed {number}", flush=True)


def _guided(minutes: float, first_seed: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["nxdi_expertscale"]):
        from tests.fuzz.readers import try_recipe
    from tests.fuzz.strategies import recipes

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(recipes)
    def one(recipe: Any) -> None:
        try:
            try_recipe(*recipe)
        except BaseException:
            print(json.dumps([recipe]))
            raise

    limits = [f"-max_total_time={int(60 * minutes)}", f"-seed={first_seed + 1}", "-timeout=120"]
    atheris.Setup([sys.argv[0], *limits], one.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
