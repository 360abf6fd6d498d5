"""Finds a checkpoint by what the user names: a folder, a model of the Hub, a prefix in S3."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nxdi_expertscale.sources.folder import open_folder
from nxdi_expertscale.sources.source import Source

S3_SCHEME = "s3://"

_HUB_ID = re.compile(r"(?P<model>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a checkpoint behind a network; see :func:`open_source`."""
    if not isinstance(name, str):
        return False
    return name.startswith(S3_SCHEME) or (
        not os.path.lexists(name) and _HUB_ID.fullmatch(name) is not None
    )


def address_of(source: Source) -> str:
    """What :func:`open_source` takes for the same files on another host."""
    from nxdi_expertscale.sources.hub import HUB_SCHEME

    return str(source.path) if source.origin is None else source.origin.removeprefix(HUB_SCHEME)


def open_source(name: str | os.PathLike[str], *, spool: Path | None = None) -> Source:
    """Open a checkpoint for reading.

    Args:
        name: A folder; ``org/name`` or ``org/name@revision`` of the Hub, where there is no such
            folder; ``s3://bucket/prefix``. What is no text, as a ``Path``, is a folder.
        spool: Folder in which up to
            :data:`~nxdi_expertscale.sources.spool.SPOOL_BYTES` of a remote checkpoint lie while
            it is read; by default one in the user's cache.

    Returns:
        The checkpoint's files; a context that closes them.

    Raises:
        CheckpointError: There is no such checkpoint, or it may not be read.
        ConfigurationError: A package that this needs is not installed.
    """
    if not is_remote(name):
        return open_folder(name)
    text = os.fspath(name)
    if text.startswith(S3_SCHEME):
        from nxdi_expertscale.sources.s3 import open_s3

        return open_s3(text, spool)
    from nxdi_expertscale.sources.hub import open_hub

    found = _HUB_ID.fullmatch(text)
    assert found is not None
    return open_hub(found["model"], found["revision"], spool)
