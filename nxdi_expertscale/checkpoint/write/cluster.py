"""The nodes of a Ray cluster as who writes the shards of a plan.

What speaks to Ray is a child process (:mod:`.cluster_driver`): Ray prints on stdout and stderr,
takes over signals, and may wait for ever, or abort, where a cluster is not what it expects. None
of it is more than an error here, and a program that uses Ray itself is left alone.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from nxdi_expertscale.checkpoint.write.cluster_node import Job, StoredShard, fingerprint
from nxdi_expertscale.checkpoint.write.executor import Run, ShardTask
from nxdi_expertscale.checkpoint.write.staging import RUN, ShardRecord
from nxdi_expertscale.errors import (
    CheckpointError,
    ConfigurationError,
    parameter,
    printable,
    shorten,
)
from nxdi_expertscale.sources.closing import Closing
from nxdi_expertscale.sources.locate import address_of

REACH_SECONDS = 10.0
"""How long a connection to a cluster may take."""

ANSWER_SECONDS = 90.0
"""How long Ray may take to join it; on a busy host it takes several."""

_END_SECONDS = 10.0

_ADDRESS = re.compile(r"(?P<host>[\w.-]+|\[[\da-fA-F:.]+\]):(?P<port>\d{1,5})", re.ASCII)

_ROOT = Path(__file__).parents[3]
"""Where this package lies."""

# "python -c" puts the working directory on the path.
_CHILD = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
sys.path.append(sys.argv[1])
from nxdi_expertscale.checkpoint.write import cluster_driver
cluster_driver.serve(int(sys.argv[2]))
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Connected:
    """The child has joined the cluster."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of the source that are done."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Note:
    """What the user should know."""

    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The run cannot go on."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Done:
    """Every shard is stored."""


def _named(address: str) -> str:
    """What messages call a cluster."""
    return f"{parameter('ray')} {address}"


def check_address(address: str) -> None:
    """Check that an address may be that of a cluster.

    Raises:
        ConfigurationError: It may not, or Ray is not installed.
    """
    if address != "auto":
        found = _ADDRESS.fullmatch(address)
        if found is None or not 0 < int(found["port"]) < 1 << 16:
            raise ConfigurationError(
                f"{_named(address)}: is not the address of a cluster; give HOST:PORT of its "
                "head, or auto, on a host that is one of its nodes"
            )
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f"{_named(address)}: needs Ray, of the version of the cluster: pip install "
            "'nxdi-expertscale[ray]'"
        )


class ClusterExecutor(Closing):
    """The nodes of a cluster as an :class:`~.executor.Executor`. A context.

    Raises:
        ConfigurationError: There is no such cluster, or it is of another version.
    """

    def __init__(self, address: str, *, workers: int | None, spool: Path | None) -> None:
        """Join the cluster.

        Args:
            address: ``HOST:PORT``, or ``auto``.
            workers: Threads of each node; by default one per core.
            spool: Folder of each node for what it reads of a source that is not a folder.
        """
        check_address(address)
        _reach(address)
        self._address = address
        self._workers = workers
        self._spool = None if spool is None else spool.absolute()
        self._connection, theirs = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(_ROOT), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "NXDI_PLUGINS": ""},
                # Ray puts the working directory on the path of every node's processes.
                cwd="/",
                # An interrupt of the terminal is for this process, which ends the other.
                start_new_session=True,
            )
        try:
            self._connection.send((address, _named(address)))
            if not self._connection.poll(ANSWER_SECONDS):
                raise ConfigurationError(
                    f"{_named(address)}: does not answer within {ANSWER_SECONDS:.0f} seconds; "
                    f"look at 'ray status --address {address}'"
                )
            self._receive()
        except BaseException:
            self._child.kill()
            self.close()
            raise

    def _receive(self) -> Any:
        """What the child says next.

        Raises:
            BaseException: What went wrong.
        """
        try:
            event = self._connection.recv()
        except (EOFError, ConnectionError):
            raise CheckpointError(
                f"{_named(self._address)}: Ray ended on this host ({self._last_words()}); run "
                "the same again when the cluster works, it goes on from the files that are finished"
            ) from None
        if isinstance(event, Failed):
            raise event.error
        return event

    def _last_words(self) -> str:
        """The last line that the child printed."""
        self._child.wait()
        self._output.seek(0)
        lines = [line for line in self._output.read().decode(errors="replace").splitlines() if line]
        return shorten(printable(lines[-1] if lines else f"status {self._child.returncode}"), 300)

    def write(
        self, run: Run, tasks: Sequence[ShardTask], finish: Callable[[ShardRecord], None]
    ) -> None:
        """Write shards to the hidden folder; see :class:`~.executor.Executor`."""
        try:
            self._write(run, tasks, finish)
        except BaseException:
            # The nodes end before anything is cleaned up.
            self.close()
            raise

    def _write(
        self, run: Run, tasks: Sequence[ShardTask], finish: Callable[[ShardRecord], None]
    ) -> None:
        source = run.source.folder
        job = Job(
            run=uuid.uuid4().hex,
            source=address_of(source),
            fingerprints={name: fingerprint(source, name) for name in run.source.files.headers},
            destination=run.destination,
            spool=self._spool,
            workers=self._workers,
        )
        run.staging.write(RUN, job.run.encode())
        with suppress(ConnectionError):  # Why the child ended is told below.
            self._connection.send((job, tuple(tasks)))
        shown = 0
        while True:
            match self._receive():
                case Progress(nbytes):
                    # What a node had done of a shard is lost with it, and done again.
                    run.meter.add(max(0, nbytes - shown))
                    shown = max(shown, nbytes)
                case StoredShard(record, stored_as):
                    run.staging.adopt(record.file, stored_as)
                    finish(record)
                case Note(text):
                    logger.warning("%s", text)
                case Done():
                    return

    def close(self) -> None:
        """Leave the cluster; what nodes are at ends."""
        self._connection.close()
        try:
            self._child.wait(_END_SECONDS)
        except BaseException as error:
            self._child.kill()
            self._child.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        finally:
            self._output.close()


def _reach(address: str) -> None:
    """Connect to a cluster's head and hang up: Ray itself tries for minutes.

    Raises:
        ConfigurationError: It cannot be reached.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        return
    place = (found["host"].strip("[]"), int(found["port"]))
    try:
        socket.create_connection(place, REACH_SECONDS).close()
    except OSError as error:
        raise ConfigurationError(
            f"{_named(address)}: no cluster can be reached there ({error.strerror or error}); give "
            "HOST:PORT of its head, or auto, on a host that is one of its nodes"
        ) from None
