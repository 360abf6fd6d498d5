"""Start a server, ask it over HTTP, and end it with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.server.served import tokens_of

_LIMIT = 1500
"""Seconds after which a server is given up. It is waited for as long as it lives."""


class ServerEndedError(Exception):
    """A server ended, or did not answer, before it was ready; the message is its log."""


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        address: Its root, such as ``http://127.0.0.1:8000``.
        model: The model's name in requests.
        log: What it and its children have written.
    """

    address: str
    model: str
    log: Path

    def lines(self, containing: str) -> list[str]:
        """The lines of the log that contain a text."""
        return [line for line in self.log.read_text().splitlines() if containing in line]

    def complete(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Ask for a completion, greedily, and give its tokens."""
        with self._post(prompt, tokens, stream=False) as response:
            return tokens_of(json.load(response)["choices"][0]["text"])

    def complete_at_once(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Ask for several completions at the same time."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, tokens), prompts))

    def stream(self, prompt: Sequence[int], tokens: int) -> list[str]:
        """Ask for a completion in pieces, and give their texts."""
        with self._post(prompt, tokens, stream=True) as response:
            events = [line[len(b"data:") :].strip() for line in response if line.strip()]
        assert events.pop() == b"[DONE]"
        return [choice["text"] for event in events for choice in json.loads(event)["choices"]]

    def _post(self, prompt: Sequence[int], tokens: int, *, stream: bool) -> Any:
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": stream,
        }
        request = urllib.request.Request(
            f"{self.address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=_LIMIT)


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serve(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, model: str
) -> Iterator[Server]:
    """Run a server until the block ends.

    Args:
        command: ``vllm serve …``, without a port.
        environment: Its variables.
        folder: Where it runs; its log is written there.
        model: The model's name in requests.

    Raises:
        ServerEndedError: It ended before it was ready.
    """
    port = free_port()
    log = folder / f"server-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", model, log)
    try:
        _wait_until_ready(server, process)
        yield server
    finally:
        _end(process)


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _LIMIT
    while not _is_ready(server):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerEndedError(server.log.read_text(errors="replace")[-20_000:])
        time.sleep(0.5)


def _is_ready(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"{server.address}/health", timeout=10) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and its children, which are in a session of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
