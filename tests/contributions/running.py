"""Runs a contribution in a process of its own: no other model or release was imported there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nxdi_expertscale.testing import FamilyCheck, check_family
from tests.contributions.contribution import Contribution
from tests.contributions.models import ALL

VARIABLE = "NXDI_EXPERTSCALE_CONTRIBUTIONS"


def sources() -> Path | None:
    """The folder that the environment names, if it does."""
    value = os.environ.get(VARIABLE)
    return Path(value).resolve() if value else None


def by_key(key: str) -> Contribution:
    """The contribution of that key."""
    return next(model for model in ALL if model.key == key)


def run(key: str, sources: Path, folder: Path) -> FamilyCheck:
    """Write a tiny model of a contribution, and check it.

    Args:
        key: The contribution's.
        sources: The folder with the sources of all.
        folder: Where the checkpoints go.
    """
    model = by_key(key)
    checkpoint = model.save(folder)
    sys.path.insert(0, str(sources / key / model.root))
    model.prepare()
    return check_family(
        checkpoint,
        model.application,
        config_cls=model.config_cls,
        make_config=model.make_config,
        **model.settings,
    )
