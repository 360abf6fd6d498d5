"""The double, and ``promises.json``, are what the releases are."""

from __future__ import annotations

from typing import Any

from tests.harness.targets import Target
from tests.upstream import promises


def test_the_target_is_what_was_recorded(nxdi: Any, target: Target) -> None:
    """The double keeps what the newest release promises; the file is that of each release."""
    promised = promises.recorded(promises.newest() if target.is_double else target.name)

    found = promises.record(nxdi)

    different = {
        name: (promised.get(name, "absent"), found.get(name, "absent"))
        for name in promised.keys() | found.keys()
        if promised.get(name, "absent") != found.get(name, "absent")
    }
    hint = "the file is of another release, or of other patches: see tests/upstream/promises.py"
    assert different == {}, hint
