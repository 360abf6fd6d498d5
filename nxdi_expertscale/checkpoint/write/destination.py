"""What a run writes to: whether it may, whether it fits, and what its disk says."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich import filesize

from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.checkpoint.write.folder_staging import (
    FolderNodeStore,
    FolderStaging,
    is_complete,
)
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST, read_manifest
from nxdi_expertscale.checkpoint.write.staging import WORK, NodeStore, Staging
from nxdi_expertscale.checkpoint.write.stray_weights import find_stray_weights
from nxdi_expertscale.errors import CheckpointError, parameter


@dataclass(frozen=True, slots=True)
class Space:
    """Room on the disk of a destination, in bytes.

    Attributes:
        needed: What is still to be written.
        free: What is free.
    """

    needed: int
    free: int

    @property
    def is_enough(self) -> bool:
        """Whether there is room for all of it."""
        return self.needed <= self.free


class Destination(Protocol):
    """What a checkpoint is written to: a folder, or a prefix in S3."""

    @property
    def path(self) -> Path | str:
        """Where it is, as people name it."""

    def check(self, source: Model, *, overwrite: bool) -> None:
        """Check that it may be written to.

        Args:
            source: What is read.
            overwrite: Whether a finished checkpoint of ours may be replaced.

        Raises:
            CheckpointError: It is the source, or has something in it that may not be replaced.
        """

    def space(self, nbytes: int) -> Space:
        """What it takes of a disk of this host to write some bytes of weights, and what is free."""

    def staging(self) -> Staging:
        """Its hidden folder."""

    def node_store(self, run: str) -> NodeStore:
        """Its hidden folder, on another host that this was sent to.

        Args:
            run: What the run calls itself in :data:`~.staging.RUN`.

        Raises:
            OSError: There is none.
            CheckpointError: It cannot be reached.
        """


@dataclass(frozen=True)
class FolderDestination:
    """A folder of this host as a :class:`Destination`."""

    path: Path

    def check(self, source: Model, *, overwrite: bool) -> None:
        """Check that it may be written to; see :func:`check_destination`."""
        check_destination(source, self.path, overwrite=overwrite)

    def space(self, nbytes: int) -> Space:
        """What its disk has to hold; see :func:`find_space`."""
        return find_space(nbytes, self.path)

    def staging(self) -> Staging:
        """Its hidden folder."""
        return FolderStaging(self.path)

    def node_store(self, run: str) -> NodeStore:
        """Its hidden folder, on another host."""
        return FolderNodeStore(self.path, run)


def check_destination(source: Model, destination: Path, *, overwrite: bool) -> None:
    """Check that a folder may be written to.

    Args:
        source: What is read.
        destination: The folder.
        overwrite: Whether a finished checkpoint of ours may be replaced.

    Raises:
        CheckpointError: It is the source, or has something in it that may not be replaced.
    """
    if isinstance(source.folder.path, Path):
        _check_apart(source.folder.path, destination)
    if not destination.exists():
        return
    if not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file; name a folder")
    if is_complete(destination):
        return
    if (destination / MANIFEST).is_file():
        if not overwrite:
            raise CheckpointError(
                f"{destination}: is a finished checkpoint; name another folder, or overwrite it "
                f"with {parameter('overwrite', 'True')}"
            )
        _check_no_stray_weights(destination)
    elif any(path.name != WORK for path in destination.iterdir()):
        raise CheckpointError(
            f"{destination}: is not empty and was not made by nxdi-expertscale; name another "
            "folder, or remove what is in it"
        )


def _check_apart(source: Path, destination: Path) -> None:
    found = destination.resolve()
    if found == source:
        raise CheckpointError(f"{destination}: is the source itself; name another folder")
    if found.is_relative_to(source):
        raise CheckpointError(
            f"{destination}: lies in the source {source}; name a folder beside it"
        )
    if source.is_relative_to(found):
        raise CheckpointError(
            f"{destination}: the source {source} lies in it; name a folder beside the source"
        )


def _check_no_stray_weights(destination: Path) -> None:
    names = [path.name for path in destination.iterdir()]
    for name in find_stray_weights(names, read_manifest(destination)):
        raise CheckpointError(
            f"{destination / name}: is no part of the checkpoint that is to be replaced, and would "
            "be loaded in place of the new one's weights; remove it"
        )


def find_space(nbytes: int, destination: Path) -> Space:
    """Compare the weights that a destination will hold with the room on its disk.

    Args:
        nbytes: Bytes of all weights; what an interrupted run has written is taken off.
        destination: The folder; it need not be there.
    """
    folder = destination
    while not folder.exists():
        folder = folder.parent
    # What an interrupted run has written already is used again.
    written = sum(
        path.lstat().st_blocks * 512 for path in (destination / WORK).glob("*.safetensors")
    )
    return Space(max(0, nbytes - written), shutil.disk_usage(folder).free)


def check_space(nbytes: int, destination: Destination) -> None:
    """Check that there is room for some bytes of weights.

    Raises:
        CheckpointError: There is not.
    """
    space = destination.space(nbytes)
    if not space.is_enough:
        raise CheckpointError(
            f"{destination.path}: needs {filesize.decimal(space.needed)} and "
            f"{filesize.decimal(space.free)} are free; free some space or name a folder on another "
            "disk"
        )


@contextmanager
def translate_disk_errors(destination: Path | str) -> Iterator[None]:
    """Translate the errors of a full or failing disk into CheckpointError.

    Raises:
        CheckpointError: The disk of the destination is full, or fails.
        OSError: Any other error of the system, which names its file itself.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            what, remedy = "the disk is full", "free some space"
        elif error.filename is None:
            what, remedy = f"cannot be written ({error.strerror})", "check the disk"
        else:
            raise
        raise CheckpointError(
            f"{destination}: {what}; {remedy} and run the same again, it goes on from the files "
            "that are finished"
        ) from error
