"""The wheel, and environments in which it is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.harness.installed import Environment, build_wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The package from its wheel; no test may change it."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "environment")
    environment.pip("install", "--quiet", "--no-deps", str(wheel))
    environment.add_dependencies()
    return environment


@pytest.fixture
def own_installation(installed: Environment, tmp_path: Path) -> Environment:
    """The same, for a test that changes it."""
    folder = shutil.copytree(installed.folder, tmp_path / "environment", symlinks=True)
    return Environment(folder)
