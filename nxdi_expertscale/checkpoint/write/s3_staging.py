"""A destination in S3, written as a folder is: to hidden keys first, the index after all else.

Shards are made in a file without a name on this host and uploaded one by one, in parts. An object
appears when all of its parts are there, with its digest beside it. Publishing copies within S3.
Parts that a run left behind when it was killed are removed by the next one.

S3 has no locks that a killed run gives back: two runs must not write to one prefix at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from io import BytesIO, FileIO
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar, cast

from nxdi_expertscale.checkpoint import digests
from nxdi_expertscale.checkpoint.json_files import MAX_JSON_BYTES
from nxdi_expertscale.checkpoint.write.manifest import FileRecord
from nxdi_expertscale.checkpoint.write.staging import RUN, WORK, Staging
from nxdi_expertscale.errors import CheckpointInUseError
from nxdi_expertscale.sources.closing import Closing
from nxdi_expertscale.sources.remote import patiently
from nxdi_expertscale.sources.s3 import Prefix, connect, parse_prefix, transfer_config, translated
from nxdi_expertscale.sources.spool import spool_folder

_DIGEST = "blake3"
"""Name of the metadata of an object that holds the digest of its content, in hexadecimal."""

_MOVES_AT_A_TIME = 16

_Answer = TypeVar("_Answer")


class S3Folder:
    """The objects right below a prefix, by name; what nobody else changes meanwhile."""

    def __init__(self, client: Any, place: Prefix) -> None:
        """List the objects."""
        self._client = client
        self._place = place
        self._sizes = self._ask(self._list)

    def _ask(self, request: Callable[[], _Answer]) -> _Answer:
        def ask() -> _Answer:
            with translated(str(self._place)):
                return request()

        return patiently(ask, str(self._place))

    def _list(self) -> dict[str, int]:
        start = self._place.key("")
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._place.bucket, Prefix=start, Delimiter="/"
        )
        found = {
            entry["Key"].removeprefix(start): int(entry["Size"])
            for page in pages
            for entry in page.get("Contents", ())
        }
        # Consoles make an empty object to show a folder.
        found.pop("", None)
        return found

    def abort_uploads(self) -> None:
        """Remove the parts of uploads that were never finished."""

        def abort() -> None:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._place.bucket, Prefix=self._place.key("")
            )
            for page in pages:
                for upload in page.get("Uploads", ()):
                    self._client.abort_multipart_upload(
                        Bucket=self._place.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )

        self._ask(abort)

    def names(self) -> list[str]:
        """The names of all objects, sorted."""
        return sorted(self._sizes)

    def is_file(self, name: str) -> bool:
        """Whether there is an object of this name."""
        return name in self._sizes

    def is_folder(self, name: str) -> bool:
        """S3 has no folders that could be in an object's way."""
        del name
        return False

    def size(self, name: str) -> int:
        """Bytes of an object."""
        return self._sizes[name]

    def digest(self, name: str) -> str:
        """Digest of an object's content, as it was written with it; empty where it was not."""
        return self._metadata(name).get(_DIGEST, "")

    def _metadata(self, name: str) -> dict[str, str]:
        found = self._ask(partial(self._client.head_object, **self._object(name)))["Metadata"]
        return cast(dict[str, str], found)

    def _object(self, name: str) -> dict[str, str]:
        return {"Bucket": self._place.bucket, "Key": self._place.key(name)}

    def read(self, name: str, *, limit: int) -> bytes:
        """Read an object, not more than some bytes of it."""

        def read() -> bytes:
            body = self._client.get_object(**self._object(name))["Body"]
            try:
                return cast(bytes, body.read(limit))
            finally:
                body.close()

        return self._ask(read)

    def write(self, name: str, content: bytes) -> None:
        """Write a small object."""
        self.upload(name, BytesIO(content), digests.digest(content).hex(), len(content))

    def upload(self, name: str, file: IO[bytes] | FileIO, digest: str, size: int) -> None:
        """Write an object from a file, in parts where it is large."""

        def upload() -> None:
            file.seek(0)
            self._client.upload_fileobj(
                # The library closes what it is given.
                _Unclosed(file),
                self._place.bucket,
                self._place.key(name),
                ExtraArgs={"Metadata": {_DIGEST: digest}},
                Config=transfer_config(),
            )

        self._ask(upload)
        self.note(name, size)

    def note(self, name: str, size: int) -> None:
        """Note an object that is there since the objects were listed."""
        self._sizes[name] = size

    def move(self, name: str, folder: S3Folder, new_name: str | None = None) -> None:
        """Move an object to another prefix of the same bucket, in place of what is there."""
        target = name if new_name is None else new_name
        arguments = {"Metadata": self._metadata(name), "MetadataDirective": "REPLACE"}
        copy = partial(
            self._client.copy,
            self._object(name),
            ExtraArgs=arguments,
            Config=transfer_config(for_copies=True),
            **folder._object(target),
        )
        self._ask(copy)
        folder._sizes[target] = self._sizes[name]
        self.remove(name)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        if self._sizes.pop(name, None) is not None:
            self._ask(partial(self._client.delete_object, **self._object(name)))

    def sync(self) -> None:
        """S3 has what it has answered for."""


class _Unclosed:
    """A file that somebody else closes."""

    def __init__(self, file: IO[bytes] | FileIO) -> None:
        self._file = file

    def close(self) -> None:
        """Leave it open, for another attempt."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class S3Staging(Staging):
    """The hidden keys of a destination in S3; see :class:`Staging`.

    Raises:
        CheckpointError: S3 does not answer, or does not let us write (on entering).
    """

    def __init__(self, destination: str, spool: Path | None) -> None:
        super().__init__(destination.rstrip("/"))
        self._destination: S3Folder
        self._work: S3Folder
        self._place = parse_prefix(destination)
        self._open = ExitStack()
        self._spool = spool_folder(spool)

    def __enter__(self) -> S3Staging:
        client = connect(self.where)
        self._open.callback(client.close)
        hidden = Prefix(self._place.bucket, self._place.key(WORK))
        try:
            self._destination = S3Folder(client, self._place)
            self._work = S3Folder(client, hidden)
            self._work.abort_uploads()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.close()

    def create(self, name: str) -> FileIO:
        """Create a file on this host, which :meth:`store` uploads."""
        del name
        return _create(self._spool)

    def store(self, name: str, file: FileIO) -> FileRecord:
        """Upload a file that is written completely, and give its space back; its record."""
        return _upload(self._work, name, file)

    def adopt(self, record: FileRecord, stored_as: str) -> None:
        """Note an object that another host has uploaded: it has its name already."""
        self._work.note(stored_as, record.size)

    def _move_all(self, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_MOVES_AT_A_TIME) as pool:
            list(pool.map(lambda name: self._work.move(name, self._destination), names))


class S3NodeStore(Closing):
    """The hidden keys of a destination on another host; see :class:`NodeStore`.

    Raises:
        CheckpointError: S3 does not answer.
    """

    def __init__(self, destination: str, run: str, spool: Path | None) -> None:
        place = parse_prefix(destination)
        self._where = destination
        self._run = run.encode()
        self._client = connect(destination)
        self._work = S3Folder(self._client, Prefix(place.bucket, place.key(WORK)))
        self._spool = spool_folder(spool)

    def is_of_run(self) -> bool:
        """Whether these are the hidden keys that the run writes to."""
        return self._work.is_file(RUN) and self._work.read(RUN, limit=MAX_JSON_BYTES) == self._run

    def stored_as(self, name: str) -> str:
        """The name by which it stores an object; each appears whole, whoever uploads it."""
        return name

    def create(self, name: str) -> FileIO:
        """Create a file on this host, which :meth:`store` uploads."""
        del name
        return _create(self._spool)

    def store(self, name: str, file: FileIO) -> FileRecord:
        """Upload a file that is written completely, and give its space back; its record.

        Raises:
            CheckpointInUseError: Another run writes to the prefix meanwhile.
        """
        # A process that is believed dead and is not must not write over what is made since.
        if not self.is_of_run():
            file.close()
            raise CheckpointInUseError(f"{self._where}: another run is writing to it")
        return _upload(self._work, name, file)

    def close(self) -> None:
        """Close connections."""
        self._client.close()


def _create(spool: Path) -> FileIO:
    return tempfile.TemporaryFile(dir=spool, buffering=0)


def _upload(folder: S3Folder, name: str, file: FileIO) -> FileRecord:
    with file:
        file.seek(0)
        digest, size = digests.digest_file_object(file), file.tell()
        folder.upload(name, file, digest, size)
    return FileRecord(name, size, digest)
