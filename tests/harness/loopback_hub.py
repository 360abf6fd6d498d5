"""A Hugging Face Hub on loopback, as far as its own client asks for it, with faults on demand.

What it answers, and with which headers, is what the real one answers: the model's listing with
``blobs=true``, files by ranges, redirects of renamed models, and ``X-Error-Code``.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.harness import loopback

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has and how it behaves; a test changes it while it runs.

    Attributes:
        url: What ``HF_ENDPOINT`` has to be.
        models: The folder of each model, by its id.
        revisions: What may be asked for in place of the commit.
        renamed: The new id of a model, by its old one.
        gated: Models that only ``token`` may read.
        token: The token.
        faults: What is done to the next requests of files, in order: ``"break"`` after half of the
            bytes, or a status.
        asked: The path and the range of every request, in order.
        is_away: Whether every request gets 503.
    """

    url: str = ""
    models: dict[str, Path] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", COMMIT)
    renamed: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_of_the_test"
    faults: list[str | int] = field(default_factory=list)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    is_away: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ranges(self, name: str) -> list[str | None]:
        """The ranges of a file that were asked for."""
        return [part for path, part in self.asked if path.endswith(f"/{name}")]


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve a hub until the end of the context."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    with loopback.serving(Handler) as hub.url:
        yield hub


class _Handler(loopback.Quiet, BaseHTTPRequestHandler):
    state: Hub

    def do_GET(self) -> None:
        hub, path = self.state, unquote(urlsplit(self.path).path)
        with hub.lock:
            hub.asked.append((path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        is_listing = parts[:2] == ["api", "models"]
        model = "/".join(parts[2:4] if is_listing else parts[:2])
        if hub.is_away:
            self._fail(503)
        elif model in hub.renamed:
            self._send(307, b"", Location=self.path.replace(model, hub.renamed[model]))
        elif model not in hub.models:
            self._fail(401, "RepoNotFound")
        elif model in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._fail(403, "GatedRepo")
        elif is_listing:
            self._list(model, parts[5] if len(parts) > 5 else "main")
        elif parts[3] not in hub.revisions:
            self._fail(404, "RevisionNotFound")
        else:
            self._give(hub.models[model] / parts[4])

    def _list(self, model: str, revision: str) -> None:
        if revision not in self.state.revisions:
            self._fail(404, "RevisionNotFound")
            return
        siblings = []
        for path in sorted(self.state.models[model].iterdir()):
            content = path.read_bytes()
            entry: dict[str, object] = {
                "rfilename": path.name,
                "size": len(content),
                "blobId": hashlib.sha1(content).hexdigest(),
            }
            if path.suffix == ".safetensors":
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        siblings.append({"rfilename": "assets/picture.png", "size": 1, "blobId": "0"})
        answer = {"id": model, "modelId": model, "sha": COMMIT, "siblings": siblings, "tags": []}
        self._send(200, json.dumps(answer).encode())

    def _give(self, path: Path) -> None:
        if not path.is_file():
            self._fail(404, "EntryNotFound")
            return
        with self.state.lock:
            fault = self.state.faults.pop(0) if self.state.faults else None
        if isinstance(fault, int):
            self._fail(fault)
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        size = path.stat().st_size
        content = path.read_bytes()[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if fault == "break":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    def _fail(self, status: int, code: str | None = None) -> None:
        headers = {} if code is None else {"X-Error-Code": code, "X-Error-Message": code}
        if status == 429:
            headers["Retry-After"] = "3600"
        self._send(status, b"{}", **headers)

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
