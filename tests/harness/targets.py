"""What the tests run on: the double, and the releases of NxDI whose sources are at hand."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.harness import standins

UPSTREAM_VARIABLE = "NXDI_EXPERTSCALE_UPSTREAM"
DOUBLE = "double"
TARGET_VARIABLE = "NXDI_EXPERTSCALE_TARGET"
"""Names the one target whose tests run in a process."""

SEED = "pr35"
VLLM_NEURON = "vllm-neuron"
_SEED_BASE = "0.7"
"""The release that the seed's pull request was written on."""


@dataclass(frozen=True)
class Target:
    """One NxDI and the NxD that belongs to it.

    Attributes:
        name: ``double``, or the number of a release.
        paths: Folders that hold ``neuronx_distributed_inference`` and ``neuronx_distributed``.
    """

    name: str
    paths: tuple[Path, ...]

    @property
    def is_double(self) -> bool:
        """Whether it is the double rather than real sources."""
        return self.name == DOUBLE

    @property
    def version(self) -> tuple[int, ...]:
        """The release as numbers; the double stands for the newest one."""
        return (0, 9) if self.is_double else tuple(int(part) for part in self.name.split("."))

    def prepare(self) -> None:
        """Make it importable in this process, which can then import no other."""
        os.environ["NXD_CPU_MODE"] = "1"
        standins.install()
        paths = [str(path) for path in self.paths]
        # A process that was started by one of the target has its path already.
        if sys.path[: len(paths)] != paths:
            sys.path[:0] = paths

    @contextmanager
    def on_one_rank(self) -> Iterator[ModuleType]:
        """Prepare it; gives :mod:`tests.harness.running`, with NxD's parallel state of one rank."""
        self.prepare()
        from nxdi_expertscale.testing import ranks
        from tests.harness import running

        with (
            tempfile.TemporaryDirectory() as folder,
            ranks.parallel_state(0, 1, Path(folder, "store")),
        ):
            yield running


def upstream_folder() -> Path | None:
    """The folder that the environment names, if it does."""
    value = os.environ.get(UPSTREAM_VARIABLE)
    return Path(value).resolve() if value else None


def release(folder: Path) -> Target | None:
    """The release whose sources a folder holds, as ``nxdi/src`` and ``nxd/src``, if it does."""
    paths = (folder / "nxdi" / "src", folder / "nxd" / "src")
    return Target(folder.name, paths) if all(path.is_dir() for path in paths) else None


def all_targets() -> dict[str, Target]:
    """The double, and each release in the folder that the environment names.

    Raises:
        FileNotFoundError: The folder is named and holds no release.
    """
    found = {DOUBLE: Target(DOUBLE, (Path(__file__).parents[1] / "upstream" / "double",))}
    folder = upstream_folder()
    if folder is not None:
        releases = [release(child) for child in sorted(folder.glob("*.*"))]
        found |= {target.name: target for target in releases if target is not None}
        if len(found) == 1:
            raise FileNotFoundError(
                f"{UPSTREAM_VARIABLE}={folder} holds no release, such as 0.9/nxdi/src and "
                "0.9/nxd/src"
            )
    return found


def target_of_this_process() -> Target | None:
    """The target that the environment names, whose tests run here and in the children."""
    name = os.environ.get(TARGET_VARIABLE)
    return None if name is None else all_targets()[name]


def seed() -> Target | None:
    """The seed's pull request with the NxD of its release, if both are at hand."""
    folder = upstream_folder()
    if folder is None:
        return None
    paths = (folder / SEED / "nxdi" / "src", folder / _SEED_BASE / "nxd" / "src")
    return Target(_SEED_BASE, paths) if all(path.is_dir() for path in paths) else None


def vllm_neuron_releases() -> dict[str, Path]:
    """The folders that hold the ``vllm_neuron`` of its releases, those that are at hand.

    They are named ``vllm-neuron-0.5.0`` and so on.
    """
    folder = upstream_folder()
    found = sorted(folder.glob(f"{VLLM_NEURON}-*")) if folder is not None else []
    return {
        path.name.removeprefix(f"{VLLM_NEURON}-"): path
        for path in found
        if (path / "vllm_neuron").is_dir()
    }
