"""A checkpoint in S3, read by ranges with ``boto3``.

Credentials, region, profile and endpoint are those of every tool of AWS. boto3 and not obstore:
it lists the multipart uploads that a run left behind, which have to be aborted, and it finds
credentials and ``AWS_ENDPOINT_URL_S3`` wherever the AWS CLI does.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdi_expertscale.errors import CheckpointError, ConfigurationError, one_line
from nxdi_expertscale.sources.remote import (
    TIMEOUT_SECONDS,
    Remote,
    RemoteFile,
    TransientError,
)

_PIECE_BYTES = 1 << 20
_CONNECTIONS = 32
_PART_BYTES = 16 << 20
_COPY_BYTES = 5 << 30


@dataclass(frozen=True, slots=True)
class Prefix:
    """A place in S3: a bucket and a prefix of keys, without a slash at its end."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def key(self, name: str) -> str:
        """The key of a file."""
        return f"{self.prefix}/{name}" if self.prefix else name


def parse_prefix(text: str) -> Prefix:
    """The place that ``s3://bucket/prefix`` names.

    Raises:
        CheckpointError: It names no bucket.
    """
    bucket, _, prefix = text.removeprefix("s3://").partition("/")
    if not bucket:
        raise CheckpointError(f"{text}: names no bucket; write s3://bucket/prefix")
    return Prefix(bucket, prefix.strip("/"))


def connect(where: str) -> Any:
    """A client of S3, as the environment says.

    Raises:
        ConfigurationError: boto3 is not installed, or the environment is not right for it.
    """
    try:
        boto3: Any = importlib.import_module("boto3")
        config: Any = importlib.import_module("botocore.config")
    except ImportError:
        raise ConfigurationError(
            f"{where}: S3 needs boto3: pip install 'nxdi-expertscale[s3]'"
        ) from None
    try:
        # Not boto3.client, which remembers the credentials of an earlier call.
        return boto3.Session().client(
            "s3",
            config=config.Config(
                connect_timeout=TIMEOUT_SECONDS,
                read_timeout=TIMEOUT_SECONDS,
                max_pool_connections=_CONNECTIONS,
            ),
        )
    except (_botocore().BotoCoreError, ValueError) as error:
        raise ConfigurationError(f"{where}: boto3 cannot be set up: {one_line(error)}") from None


def _transfer_errors() -> tuple[type[Exception], ...]:
    """What boto3 makes of an upload that failed: the cause is in the text alone."""
    return (importlib.import_module("boto3.exceptions").Boto3Error,)


def transfer_config(*, for_copies: bool = False) -> Any:
    """How large objects are written: in parts of 16 MiB; copies within S3 whole, up to 5 GB."""
    transfer: Any = importlib.import_module("boto3.s3.transfer")
    part = _COPY_BYTES if for_copies else _PART_BYTES
    return transfer.TransferConfig(multipart_threshold=part, multipart_chunksize=part)


def _botocore() -> Any:
    return importlib.import_module("botocore.exceptions")


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Translate the errors of S3.

    Raises:
        TransientError: It may be possible at the next attempt.
        CheckpointError: It is not, and why.
    """
    errors = _botocore()
    try:
        yield
    except errors.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status >= 500 or status == 429 or code in {"SlowDown", "RequestTimeout"}:
            raise TransientError(f"S3 answers {code}") from error
        if code in {"PreconditionFailed", "412"}:
            raise CheckpointError(
                f"{where}: was changed while it was read; run quantize again when it is complete"
            ) from None
        raise CheckpointError(
            f"{where}: S3 answers {code}; look at the name, at the credentials and at the region"
        ) from None
    except (errors.NoCredentialsError, errors.PartialCredentialsError, errors.TokenRetrievalError):
        raise CheckpointError(
            f"{where}: there are no credentials for AWS; set them as for the AWS CLI"
        ) from None
    except errors.ParamValidationError as error:
        raise CheckpointError(f"{where}: is no place in S3 ({one_line(error)})") from None
    except (errors.BotoCoreError, *_transfer_errors(), OSError) as error:
        raise TransientError(f"the connection failed ({type(error).__name__})") from error


def open_s3(text: str, spool: Path | None) -> Remote:
    """Open a checkpoint in S3.

    Args:
        text: ``s3://bucket/prefix``.
        spool: Folder for what is read.

    Raises:
        CheckpointError: There is nothing there, or it may not be read.
        ConfigurationError: boto3 is not installed.
    """
    place = parse_prefix(text)
    return Remote(_S3(connect(str(place)), place), spool)


class _S3:
    """S3 as a :class:`~nxdi_expertscale.sources.remote.Transport`."""

    def __init__(self, client: Any, place: Prefix) -> None:
        self._client = client
        self._place = place
        self._files: dict[str, RemoteFile] = {}
        self.path = self.origin = str(place)

    def files(self) -> Mapping[str, RemoteFile]:
        """The objects right below the prefix."""
        start = self._place.key("")
        with translated(self.path):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._place.bucket, Prefix=start, Delimiter="/"
            )
            self._files = {
                entry["Key"].removeprefix(start): RemoteFile(
                    entry["Size"], entry["ETag"], int(entry["LastModified"].timestamp() * 1e9)
                )
                for page in pages
                for entry in page.get("Contents", ())
                if entry["Key"] != start
            }
        if not self._files:
            raise CheckpointError(f"{self.path}: there is nothing there; look at the name")
        return self._files

    @contextmanager
    def stream(self, name: str, offset: int, length: int) -> Iterator[Iterator[bytes]]:
        """The bytes of a range of an object that is still the one that was listed."""
        with translated(f"{self.path}/{name}"):
            body = self._client.get_object(
                Bucket=self._place.bucket,
                Key=self._place.key(name),
                Range=f"bytes={offset}-{offset + length - 1}",
                IfMatch=self._files[name].identity,
            )["Body"]
            try:
                yield body.iter_chunks(_PIECE_BYTES)
            finally:
                body.close()

    def cached(self, name: str) -> Path | None:
        """Nothing of S3 is on this host."""
        del name
        return None

    def close(self) -> None:
        """Close connections."""
        self._client.close()
