"""One node of a cluster: it writes the shards that it is given, as one machine writes all."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from nxdi_expertscale.checkpoint.read.files import WeightFiles
from nxdi_expertscale.checkpoint.write.destination import Destination
from nxdi_expertscale.checkpoint.write.executor import ShardTask
from nxdi_expertscale.checkpoint.write.staging import NodeStore, ShardRecord
from nxdi_expertscale.errors import CheckpointError, ExpertScaleError
from nxdi_expertscale.sources.locate import open_source
from nxdi_expertscale.sources.source import Source

SHARED_SECONDS = 10.0
"""How long a file that another host wrote may take to be seen; NFS remembers what was not there."""

_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """What all nodes of a run are told.

    Attributes:
        run: What the run calls itself in its hidden folder.
        source: What is read, as :func:`~nxdi_expertscale.sources.locate.open_source` takes it.
        fingerprints: What each of its files of weights has to be; see :func:`fingerprint`.
        destination: What is written to.
        spool: Folder of each node for what it reads of a source that is not a folder.
        workers: Threads of each node; None for one per core.
    """

    run: str
    source: str
    fingerprints: Mapping[str, str]
    destination: Destination
    spool: Path | None
    workers: int | None


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A shard that a node has stored, to be adopted by the run.

    Attributes:
        record: Its record.
        stored_as: The name of its file until then.
    """

    record: ShardRecord
    stored_as: str


def fingerprint(source: Source, name: str) -> str:
    """What is the same for a file of a source on every host that reads it.

    Device and inode are a host's own; a model in the Hub's cache is known by its commit.
    """
    if not isinstance(source.path, Path):
        return source.identity(name)
    size = str(source.size(name))
    return size if source.origin is not None else f"{size}:{source.mtime_ns(name)}"


class Node:
    """Writes shards in a process of a node. Its methods are called from several threads."""

    def __init__(self, job: Job, workers: int) -> None:
        """Do nothing yet: what fails here is not told as the error that it is.

        Args:
            job: What is read, and where it is written.
            workers: Threads.
        """
        self._job = job
        self._workers = workers
        self._tasks: queue.SimpleQueue[ShardTask | None] = queue.SimpleQueue()
        self._stored: dict[str, Future[StoredShard]] = {}
        self._failure: BaseException | None = None
        self._done = 0
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def join(self) -> None:
        """Check that source and destination are those of the run, and begin.

        Raises:
            CheckpointError: They are not.
        """
        store = self._open_store()
        source = self._open_source()
        for name, expected in self._job.fingerprints.items():
            if not source.has(name) or fingerprint(source, name) != expected:
                raise CheckpointError(
                    f"{source.location(name)}: node {socket.gethostname()} does not have the file "
                    "that is read here; name a folder that all nodes share, a model of the Hub, "
                    "or s3://BUCKET/PREFIX"
                )
        files = WeightFiles(source, {}, dict.fromkeys(self._job.fingerprints, b""))
        thread = threading.Thread(target=self._stream, args=(files, store), daemon=True)
        thread.start()
        self._thread = thread

    def _open_source(self) -> Source:
        try:
            return open_source(self._job.source, spool=self._job.spool)
        except ExpertScaleError as error:
            raise type(error)(f"node {socket.gethostname()}: {error}") from error

    def _open_store(self) -> NodeStore:
        """The destination's hidden folder, where the run has written its name."""
        give_up_at = time.monotonic() + SHARED_SECONDS
        while True:
            try:
                store = self._job.destination.node_store(self._job.run)
                if store.is_of_run():
                    return store
                store.close()
            except OSError:
                pass  # It is not there, or not yet.
            if time.monotonic() > give_up_at:
                raise CheckpointError(
                    f"{self._job.destination.path}: node {socket.gethostname()} does not see what "
                    "this host writes there; name a folder that all nodes share, or "
                    "s3://BUCKET/PREFIX"
                )
            time.sleep(_LOOK_SECONDS)

    def _stream(self, files: WeightFiles, store: NodeStore) -> None:
        # Not at the top: the process that commands the nodes reads this module without torch.
        from nxdi_expertscale.checkpoint.write.stream import stream_shards

        def finish(record: ShardRecord) -> None:
            name = record.file.name
            with self._lock:
                stored = self._stored.pop(name)
            stored.set_result(StoredShard(record, store.stored_as(name)))

        try:
            stream_shards(
                files,
                iter(self._tasks.get, None),
                store,
                workers=self._workers,
                count=self._count,
                finish=finish,
            )
        except BaseException as error:  # Whoever waits for a shard raises it.
            with self._lock:
                self._failure = error
                failed = list(self._stored.values())
            for stored in failed:
                stored.set_exception(error)
        finally:
            store.close()
            files.folder.close()

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes

    def write(self, task: ShardTask) -> StoredShard:
        """Write a shard; several may be asked for, and are written in this order.

        Raises:
            CheckpointError: As :func:`~nxdi_expertscale.checkpoint.write.stream.stream_shards`.
            OSError: Reading or writing failed.
        """
        stored: Future[StoredShard] = Future()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._stored[task.plan.name] = stored
        self._tasks.put(task)
        return stored.result()

    def done(self) -> int:
        """Bytes of the source that are done, of finished shards and of others."""
        with self._lock:
            return self._done

    def leave(self) -> None:
        """End when everything is written, and close what was opened."""
        self._tasks.put(None)
        if self._thread is not None:
            self._thread.join()
