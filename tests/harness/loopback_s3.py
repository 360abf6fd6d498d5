"""An S3 on loopback, as far as boto3 asks for it here, with faults on demand.

``tox -e sources`` runs the same tests on moto's server, which knows all of S3.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.harness import loopback

_META = "x-amz-meta-"
_NEVER = "2026-01-01T00:00:00.000Z"


@dataclass
class Stored:
    """An object: its content and its metadata."""

    content: bytes
    metadata: dict[str, str]

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.content).hexdigest()}"'


@dataclass
class S3:
    """What the server holds and how it behaves; a test changes it while it runs.

    Attributes:
        url: What ``AWS_ENDPOINT_URL`` has to be.
        objects: The objects of all buckets, by bucket and key.
        uploads: The parts of uploads that are not finished, by their ids.
        faults: What is done to the next reads of objects, in order: ``"break"`` after half of the
            bytes, or a status.
        held: Names of objects whose last bytes are not given until they are taken off.
        refuse_parts: Whether no part of an upload is taken.
        written: The keys that appeared, in order.
    """

    url: str = ""
    objects: dict[tuple[str, str], Stored] = field(default_factory=dict)
    uploads: dict[str, tuple[str, str, dict[str, str], dict[int, bytes]]] = field(
        default_factory=dict
    )
    faults: list[str | int] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    refuse_parts: bool = False
    written: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serve() -> Iterator[S3]:
    """Serve an empty S3 until the end of the context."""
    state = S3()

    class Handler(_Handler):
        s3 = state

    with loopback.serving(Handler) as state.url:
        yield state


class _Handler(loopback.Quiet, BaseHTTPRequestHandler):
    s3: S3

    def _parse(self) -> tuple[str, str, dict[str, str]]:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = parse_qs(parts.query, keep_blank_values=True)
        return bucket, key, {name: values[0] for name, values in query.items()}

    def do_GET(self) -> None:
        bucket, key, query = self._parse()
        if "uploads" in query:
            self._list_uploads(bucket, query.get("prefix", ""))
        elif not key:
            self._list(bucket, query.get("prefix", ""))
        else:
            self._give(bucket, key)

    def do_HEAD(self) -> None:
        bucket, key, _ = self._parse()
        found = self.s3.objects.get((bucket, key))
        if found is None:
            self._send(404)
        else:
            self._send(200, b"", length=len(found.content), **self._headers(found))

    def _headers(self, found: Stored) -> dict[str, str]:
        return {
            "ETag": found.etag,
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            **{_META + name: value for name, value in found.metadata.items()},
        }

    def _list(self, bucket: str, prefix: str) -> None:
        with self.s3.lock:
            entries = sorted(
                (key, found) for (place, key), found in self.s3.objects.items() if place == bucket
            )
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(found.content)}</Size>"
            f"<ETag>{escape(found.etag)}</ETag><LastModified>{_NEVER}</LastModified></Contents>"
            for key, found in entries
            if key.startswith(prefix) and "/" not in key.removeprefix(prefix)
        )
        self._xml("ListBucketResult", f"<IsTruncated>false</IsTruncated>{contents}")

    def _list_uploads(self, bucket: str, prefix: str) -> None:
        with self.s3.lock:
            found = "".join(
                f"<Upload><Key>{escape(key)}</Key><UploadId>{number}</UploadId></Upload>"
                for number, (place, key, _, _) in self.s3.uploads.items()
                if place == bucket and key.startswith(prefix)
            )
        self._xml("ListMultipartUploadsResult", f"<IsTruncated>false</IsTruncated>{found}")

    def _give(self, bucket: str, key: str) -> None:
        found = self.s3.objects.get((bucket, key))
        if found is None:
            self._error(404, "NoSuchKey")
            return
        if self.headers.get("If-Match", found.etag) != found.etag:
            self._error(412, "PreconditionFailed")
            return
        with self.s3.lock:
            fault = self.s3.faults.pop(0) if self.s3.faults else None
        if isinstance(fault, int):
            self._error(fault, "SlowDown")
            return
        content, status = found.content, 200
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            self._wait(key, int(last) + 1 >= len(content))
            content, status = content[int(first) : int(last) + 1], 206
        if fault == "break":
            self._send(status, b"", length=len(content), **self._headers(found))
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self._send(status, content, **self._headers(found))

    def _wait(self, key: str, is_end: bool) -> None:
        while is_end and key.rpartition("/")[2] in self.s3.held:
            time.sleep(0.05)

    def do_PUT(self) -> None:
        bucket, key, query = self._parse()
        body = self._body()
        metadata = {
            name.lower().removeprefix(_META): value
            for name, value in self.headers.items()
            if name.lower().startswith(_META)
        }
        if "partNumber" in query:
            if self.s3.refuse_parts:
                self._error(403, "AccessDenied")
                return
            with self.s3.lock:
                self.s3.uploads[query["uploadId"]][3][int(query["partNumber"])] = body
            self._send(200, b"", ETag=f'"{hashlib.md5(body).hexdigest()}"')
        elif "x-amz-copy-source" in self.headers:
            source = unquote(self.headers["x-amz-copy-source"]).lstrip("/").partition("/")
            copied = self.s3.objects[source[0], source[2]]
            self._store(bucket, key, Stored(copied.content, metadata))
            self._xml("CopyObjectResult", f"<ETag>{escape(copied.etag)}</ETag>")
        else:
            stored = Stored(body, metadata)
            self._store(bucket, key, stored)
            self._send(200, b"", ETag=stored.etag)

    def _store(self, bucket: str, key: str, stored: Stored) -> None:
        with self.s3.lock:
            self.s3.objects[bucket, key] = stored
            self.s3.written.append(key)

    def do_POST(self) -> None:
        bucket, key, query = self._parse()
        body = self._body()
        if "uploads" in query:
            metadata = {
                name.lower().removeprefix(_META): value
                for name, value in self.headers.items()
                if name.lower().startswith(_META)
            }
            with self.s3.lock:
                number = f"upload-{len(self.s3.uploads)}-{len(self.s3.written)}-{id(body)}"
                self.s3.uploads[number] = (bucket, key, metadata, {})
            result = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key>"
            self._xml("InitiateMultipartUploadResult", f"{result}<UploadId>{number}</UploadId>")
            return
        with self.s3.lock:
            _, _, metadata, parts = self.s3.uploads.pop(query["uploadId"])
        stored = Stored(b"".join(parts[number] for number in sorted(parts)), metadata)
        self._store(bucket, key, stored)
        self._xml("CompleteMultipartUploadResult", f"<ETag>{escape(stored.etag)}</ETag>")

    def do_DELETE(self) -> None:
        bucket, key, query = self._parse()
        with self.s3.lock:
            if "uploadId" in query:
                self.s3.uploads.pop(query["uploadId"], None)
            else:
                self.s3.objects.pop((bucket, key), None)
        self._send(204)

    def _body(self) -> bytes:
        """The body of a request, without the signatures of its chunks where it has them."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.headers.get("x-amz-content-sha256", "").startswith("STREAMING"):
            return data
        content = b""
        while data:
            head, _, data = data.partition(b"\r\n")
            size = int(head.partition(b";")[0], 16)
            if size == 0:
                break
            content, data = content + data[:size], data[size + 2 :]
        return content

    def _error(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
        self._send(status, body.encode())

    def _xml(self, name: str, content: str) -> None:
        self._send(200, f"<?xml version='1.0'?><{name}>{content}</{name}>".encode())

    def _send(
        self, status: int, body: bytes = b"", *, length: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
