"""Finds the destination that the user names: a folder, or a prefix in S3."""

from __future__ import annotations

import os
from pathlib import Path

from nxdi_expertscale.checkpoint.write.destination import Destination, FolderDestination
from nxdi_expertscale.checkpoint.write.s3_destination import S3Destination
from nxdi_expertscale.sources.folder import local_path
from nxdi_expertscale.sources.locate import S3_SCHEME
from nxdi_expertscale.sources.spool import spool_folder


def open_destination(dst: str | os.PathLike[str], spool: Path | None) -> Destination:
    """What a name is that of: ``s3://bucket/prefix``, or a folder.

    Args:
        dst: The name.
        spool: Where files lie until they are in S3.

    Raises:
        CheckpointError: It is no place; see :func:`~nxdi_expertscale.sources.folder.local_path`.
    """
    if is_in_s3(dst):
        return S3Destination(os.fspath(dst), spool)
    return FolderDestination(local_path(dst).absolute())


def spool_for(dst: str | os.PathLike[str], spool: Path | None) -> Path:
    """The folder for what lies on this host meanwhile: by default on the disk of a folder.

    Args:
        dst: The destination.
        spool: What the user named, if anything.

    Raises:
        CheckpointError: There is none that can be written.
    """
    return spool_folder(spool, beside=None if is_in_s3(dst) else local_path(dst))


def is_in_s3(dst: str | os.PathLike[str]) -> bool:
    """Whether a name is ``s3://bucket/prefix``."""
    return isinstance(dst, str) and dst.startswith(S3_SCHEME)
