"""The child process that speaks to Ray: it hands shards to the nodes, and passes on what they say.

A node that is lost has its shards done by the others; one that is new, or is there again, is
taken in when another is lost.
"""

from __future__ import annotations

import importlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from nxdi_expertscale.checkpoint.parallel import MAX_WORKERS
from nxdi_expertscale.checkpoint.write.cluster import Connected, Done, Failed, Note, Progress
from nxdi_expertscale.checkpoint.write.cluster_node import Job, Node, StoredShard
from nxdi_expertscale.checkpoint.write.executor import ShardTask
from nxdi_expertscale.errors import CheckpointError, ConfigurationError, one_line, shorten
from nxdi_expertscale.version import __version__

SHARDS_AHEAD = 2
"""Shards that a node has at a time: it converts one while the one before goes to the disk."""

MAX_LOSSES = 3
"""How often a node is lost before nothing is given to it any more."""

_TICK_SECONDS = 0.5
_PATIENCE_SECONDS = 30.0


def serve(descriptor: int) -> None:
    """Do what the parent process asks for.

    Args:
        descriptor: The child's end of the pipe between them.
    """
    with Connection(descriptor) as parent:
        try:
            _serve(parent)
        except (EOFError, BrokenPipeError):
            return  # The parent has ended, or does not want any more.
        except Exception as error:
            parent.send(Failed(error))


def _serve(parent: Connection) -> None:
    address, name = parent.recv()
    ray: Any = importlib.import_module("ray")
    _join(ray, address, name)
    parent.send(Connected())
    job, tasks = parent.recv()
    Dispatcher(ray, job, tasks, parent).run()
    parent.send(Done())


def _join(ray: Any, address: str, name: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (RuntimeError, ConnectionError, ValueError) as error:
        text = shorten(one_line(error).partition(": ")[2], 400)
        raise ConfigurationError(
            f"{name}: this host cannot join ({text}); it has to be one of the cluster's "
            "nodes, with the same Python and Ray as the others"
        ) from None


@dataclass(eq=False)
class _Member:
    """A node that writes.

    Attributes:
        node_id: Ray's name of it.
        host: What people call it.
        workers: Threads that it gets.
        cpus: CPUs that Ray keeps for them.
        actor: The process on it, once it is known that it has this package.
        has_joined: Whether it takes shards.
        tasks: The shards that it has.
        done: Bytes of the source that it says it has done.
        finished: Bytes of the source of the shards that it has stored.
        is_asked: Whether it is to say how much it has done, and has not yet.
    """

    node_id: str
    host: str
    workers: int
    cpus: int
    actor: Any = None
    has_joined: bool = False
    tasks: list[ShardTask] = field(default_factory=list)
    done: int = 0
    finished: int = 0
    is_asked: bool = False


@dataclass(frozen=True)
class _Call:
    """A call to a node that has not returned; ``take`` is called with what it returns."""

    member: _Member
    take: Callable[[Any], None]


class Dispatcher:
    """Hands shards to the nodes of a cluster until all are stored."""

    def __init__(self, ray: Any, job: Job, tasks: Sequence[ShardTask], parent: Connection) -> None:
        """Do nothing yet.

        Args:
            ray: The module, which has joined the cluster.
            job: What the nodes are told.
            tasks: The shards.
            parent: Takes what there is to say.
        """
        self._ray = ray
        self._errors: Any = importlib.import_module("ray.exceptions")
        self._job = job
        self._waiting = deque(tasks)
        self._left = len(tasks)
        self._parent = parent
        self._members: dict[str, _Member] = {}
        self._calls: dict[Any, _Call] = {}
        self._losses: Counter[str] = Counter()
        self._last_loss = "the cluster has none with a CPU"
        self._finished = 0
        self._node_actor = ray.remote(Node)
        self._probe = ray.remote(_make_probe())
        self._started = time.monotonic()
        self._has_warned = False
        self._asked_at = 0.0
        self._has_begun = False

    def run(self) -> None:
        """Have all shards written.

        Raises:
            CheckpointError: No node is left, or one cannot write.
            ConfigurationError: A node has not this package, or another version of it.
        """
        try:
            self._staff()
            while self._left:
                self._hand_out()
                self._ask_for_progress()
                ready, _ = self._ray.wait(list(self._calls), timeout=_TICK_SECONDS)
                for reference in ready:
                    self._take(reference)
                self._report()
            leaving = [m.actor.leave.remote() for m in self._members.values() if m.has_joined]
            self._ray.wait(leaving, num_returns=len(leaving), timeout=_TICK_SECONDS)
        finally:
            for member in self._members.values():
                if member.actor is not None:
                    self._ray.kill(member.actor)

    def _staff(self) -> None:
        """Take in every node of the cluster that is there and not taken in."""
        nodes = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"]}
        if self._ray.get_runtime_context().get_node_id() not in nodes:
            raise CheckpointError(
                "Ray: the cluster's node on this host has ended; start it and run the same again, "
                "it goes on from the files that are finished"
            )
        for node_id, node in nodes.items():
            cpus = int(node["Resources"].get("CPU", 0))
            if node_id in self._members or not cpus or self._losses[node_id] >= MAX_LOSSES:
                continue
            workers = self._job.workers or min(cpus, MAX_WORKERS)
            member = _Member(node_id, node["NodeManagerHostname"], workers, min(workers, cpus))
            self._members[node_id] = member
            probe = self._probe.options(
                num_cpus=0, max_retries=0, scheduling_strategy=self._on(member)
            )
            self._call(member, probe.remote(), partial(self._start, member))
        if not self._members:
            raise CheckpointError(
                f"Ray: no node is left that can write ({self._last_loss}); look at the cluster and "
                "run the same again, it goes on from the files that are finished"
            )

    def _on(self, member: _Member) -> Any:
        strategies: Any = importlib.import_module("ray.util.scheduling_strategies")
        return strategies.NodeAffinitySchedulingStrategy(member.node_id, soft=False)

    def _call(self, member: _Member, reference: Any, take: Callable[[Any], None]) -> None:
        self._calls[reference] = _Call(member, take)

    def _start(self, member: _Member, found: str | None) -> None:
        """Start the process that writes on a node, where the package is the one that is here."""
        if found != __version__:
            what = f"has nxdi-expertscale {found}" if found else "has no nxdi-expertscale"
            raise ConfigurationError(
                f"Ray: node {member.host} {what}, and this host {__version__}; install the same "
                "version on every node, in the Python that Ray runs in"
            )
        member.actor = self._node_actor.options(
            num_cpus=member.cpus,
            max_concurrency=SHARDS_AHEAD + 2,
            max_restarts=0,
            scheduling_strategy=self._on(member),
        ).remote(self._job, member.workers)

        def joined(_nothing: None) -> None:
            member.has_joined = True

        self._call(member, member.actor.join.remote(), joined)

    def _may_begin(self) -> bool:
        """Whether each node has joined: what is wrong with one is told before anything is done.

        One that Ray has no CPUs on now is not waited for longer.
        """
        if not self._has_begun:
            self._has_begun = self._is_late() or all(m.has_joined for m in self._members.values())
        return self._has_begun

    def _is_late(self) -> bool:
        return time.monotonic() - self._started > _PATIENCE_SECONDS

    def _hand_out(self) -> None:
        if not self._may_begin():
            return
        joined = [member for member in self._members.values() if member.has_joined]
        for shards in range(SHARDS_AHEAD):
            for member in joined:
                if self._waiting and len(member.tasks) <= shards:
                    self._give(member, self._waiting.popleft())

    def _give(self, member: _Member, task: ShardTask) -> None:
        member.tasks.append(task)

        def stored(shard: StoredShard) -> None:
            member.tasks.remove(task)
            member.finished += task.plan.source_bytes
            self._finished += task.plan.source_bytes
            self._left -= 1
            self._parent.send(shard)

        self._call(member, member.actor.write.remote(task), stored)

    def _ask_for_progress(self) -> None:
        if time.monotonic() - self._asked_at < _TICK_SECONDS:
            return
        self._asked_at = time.monotonic()
        for member in self._members.values():
            if member.has_joined and not member.is_asked:
                self._ask(member)

    def _ask(self, member: _Member) -> None:
        def said(done: int) -> None:
            member.is_asked, member.done = False, done

        member.is_asked = True
        self._call(member, member.actor.done.remote(), said)

    def _take(self, reference: Any) -> None:
        """Take what a call has returned, if the node that was called still counts."""
        call = self._calls.pop(reference, None)
        if call is None:
            return
        try:
            value = self._ray.get(reference)
        except self._errors.RayTaskError as error:
            if isinstance(error.cause, ImportError):
                raise ConfigurationError(
                    f"Ray: node {call.member.host}: {one_line(error.cause)}; install "
                    "nxdi-expertscale with all that it needs on every node"
                ) from error
            raise error.cause from error
        except self._errors.RayError as error:
            self._lose(call.member, error)
        else:
            call.take(value)

    def _lose(self, member: _Member, error: Exception) -> None:
        """Give a node up, and its shards to the others."""
        del self._members[member.node_id]
        self._calls = {
            reference: call for reference, call in self._calls.items() if call.member is not member
        }
        self._waiting.extendleft(reversed(member.tasks))
        self._losses[member.node_id] += 1
        self._last_loss = f"node {member.host}: {shorten(one_line(error), 300)}"
        if member.actor is not None:
            self._ray.kill(member.actor)
        if member.has_joined:
            self._parent.send(Note(f"node {member.host} is lost; others write its shards"))
        self._staff()

    def _report(self) -> None:
        """Say how far it is; where the parent has ended, this ends as well."""
        if self._parent.poll():
            raise EOFError
        begun = sum(max(0, m.done - m.finished) for m in self._members.values())
        self._parent.send(Progress(self._finished + begun))
        joined = any(member.has_joined for member in self._members.values())
        if self._is_late() and not joined and not self._has_warned:
            self._has_warned = True
            self._parent.send(Note("Ray: waits until the cluster has CPUs that are free"))


def _make_probe() -> Callable[[], str | None]:
    """A function that finds the version of this package, also where there is none."""

    # Within another one it is sent as it is, and not by its name.
    def probe() -> str | None:
        try:
            from nxdi_expertscale.version import __version__ as version
        except ImportError:
            return None
        return version

    return probe
