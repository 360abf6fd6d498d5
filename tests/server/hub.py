"""A Hub on this machine, with one repository: what its client and transformers ask it for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPOSITORY, COMMIT = "someone/Tiny-MoE", "0123456789abcdef0123456789abcdef01234567"


class _Repository(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, snapshot: Path) -> None:
        self._snapshot = snapshot
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        information = f"/api/models/{REPOSITORY}"
        files = {file.name: file for file in self._snapshot.iterdir() if file.is_file()}
        if path in (
            information,
            f"{information}/revision/main",
            f"{information}/revision/{COMMIT}",
        ):
            names = [{"rfilename": name} for name in sorted(files)]
            self._send_json({"id": REPOSITORY, "sha": COMMIT, "siblings": names})
        elif path.startswith(f"{information}/tree/"):
            self._send_json(
                [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": COMMIT}
                    for name, file in sorted(files.items())
                ]
            )
        elif path.startswith(f"/{REPOSITORY}/resolve/") and path.rpartition("/")[2] in files:
            self._send(HTTPStatus.OK, files[path.rpartition("/")[2]].read_bytes(), {})
        else:
            self._send(HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "EntryNotFound"})

    def _send_json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        headers = {
            **headers,
            "Content-Length": str(len(body)),
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(snapshot: Path) -> Iterator[str]:
    """Serve a checkpoint as :data:`REPOSITORY`; the Hub's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Repository, snapshot=snapshot))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
