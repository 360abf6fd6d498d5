"""This package imported before NxDI, and after it: each in a process of its own.

This module imports nothing of the package itself: the processes import the module.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import processes
from tests.harness.targets import Target

WITHIN_FP8 = 0.06


def errors_when_imported(
    _rank: int, before: bool, checkpoint: Path, settings: dict[str, Any]
) -> list[float]:
    """The model's errors where this package is imported before NxDI, or after it."""
    assert "nxdi_expertscale" not in sys.modules
    if before:
        import nxdi_expertscale
    from tests.harness import running

    if not before:
        import nxdi_expertscale
    assert nxdi_expertscale.status()
    return running.moe_errors(checkpoint, running.load(checkpoint, **settings))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_import_before_nxdi_or_after_it(
    nxdi: Any, target: Target, moe: Path, tmp_path: Path, before: bool
) -> None:
    settings = {**nxdi.quantize(moe, tmp_path / "fp8"), "expert_wise_scale": True}

    [errors] = processes.run_on_ranks(
        target, 1, tmp_path / "store", errors_when_imported, before, moe, settings
    )

    assert max(errors) < WITHIN_FP8
