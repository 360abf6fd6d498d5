"""How the tests are spread over the processes of pytest-xdist, if there are any."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep together what shares fixtures: the tests of a file, or all tests of a target."""
    for item in items:
        callspec: Any = getattr(item, "callspec", None)
        target = None if callspec is None else callspec.params.get("target_name")
        item.add_marker(pytest.mark.xdist_group(target or item.path.stem))
