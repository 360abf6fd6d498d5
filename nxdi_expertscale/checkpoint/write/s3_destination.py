"""A prefix in S3 that a run writes to: whether it may, and whether its shards fit on this host."""

from __future__ import annotations

import shutil
from pathlib import Path

from nxdi_expertscale.checkpoint.json_files import MAX_JSON_BYTES
from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.checkpoint.write.destination import Space
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST, parse_manifest
from nxdi_expertscale.checkpoint.write.plan import MAX_OPEN_SHARDS, MAX_SHARD_BYTES
from nxdi_expertscale.checkpoint.write.s3_staging import S3Folder, S3NodeStore, S3Staging
from nxdi_expertscale.checkpoint.write.staging import WORK, NodeStore, Staging
from nxdi_expertscale.checkpoint.write.stray_weights import find_stray_weights
from nxdi_expertscale.errors import CheckpointError, parameter
from nxdi_expertscale.sources.s3 import Prefix, connect, parse_prefix
from nxdi_expertscale.sources.spool import spool_folder


class S3Destination:
    """A prefix in S3 as a :class:`~nxdi_expertscale.checkpoint.write.destination.Destination`."""

    def __init__(self, text: str, spool: Path | None) -> None:
        self._place = parse_prefix(text)
        self._spool = None if spool is None else spool.absolute()
        self.path = str(self._place)

    def check(self, source: Model, *, overwrite: bool) -> None:
        """Check that it may be written to.

        Raises:
            CheckpointError: It is the source, or has something in it that may not be replaced.
        """
        self._check_apart(str(source.folder.path))
        client = connect(self.path)
        try:
            found = S3Folder(client, self._place)
            hidden = S3Folder(client, Prefix(self._place.bucket, self._place.key(WORK)))
            if hidden.is_file(MANIFEST):
                return
            if found.is_file(MANIFEST):
                if not overwrite:
                    raise CheckpointError(
                        f"{self.path}: is a finished checkpoint; name another prefix, or overwrite "
                        f"it with {parameter('overwrite', 'True')}"
                    )
                self._check_no_stray_weights(found)
            elif found.names():
                raise CheckpointError(
                    f"{self.path}: is not empty and was not made by nxdi-expertscale; name another "
                    "prefix, or remove what is there"
                )
        finally:
            client.close()

    def _check_apart(self, source: str) -> None:
        ours, theirs = f"{self.path}/", f"{source}/"
        if ours.startswith(theirs) or theirs.startswith(ours):
            raise CheckpointError(
                f"{self.path}: is the source {source}, or one lies in the other; name a prefix "
                "beside it"
            )

    def _check_no_stray_weights(self, found: S3Folder) -> None:
        content = found.read(MANIFEST, limit=MAX_JSON_BYTES)
        manifest = parse_manifest(content, f"{self.path}/{MANIFEST}")
        for name in find_stray_weights(found.names(), manifest):
            raise CheckpointError(
                f"{self.path}/{name}: is no part of the checkpoint that is to be replaced, and "
                "would be loaded in place of the new one's weights; remove it"
            )

    def space(self, nbytes: int) -> Space:
        """What lies on this host at a time, on its way to S3."""
        waiting = min(nbytes, MAX_OPEN_SHARDS * MAX_SHARD_BYTES)
        return Space(waiting, shutil.disk_usage(spool_folder(self._spool)).free)

    def staging(self) -> Staging:
        """Its hidden keys."""
        return S3Staging(self.path, self._spool)

    def node_store(self, run: str) -> NodeStore:
        """Its hidden keys, on another host."""
        return S3NodeStore(self.path, run, self._spool)
