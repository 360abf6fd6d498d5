"""Finds the destination that the user names: a folder, or a prefix in S3."""

from __future__ import annotations

import os
from pathlib import Path

from nxdi_expertscale.checkpoint.write.destination import Destination, FolderDestination
from nxdi_expertscale.checkpoint.write.s3_destination import S3Destination
from nxdi_expertscale.sources.locate import S3_SCHEME


def open_destination(dst: str | os.PathLike[str], spool: Path | None) -> Destination:
    """What a name is that of: ``s3://bucket/prefix``, or a folder.

    Args:
        dst: The name.
        spool: Where files lie until they are in S3.
    """
    if isinstance(dst, str) and dst.startswith(S3_SCHEME):
        return S3Destination(dst, spool)
    return FolderDestination(Path(dst).absolute())
