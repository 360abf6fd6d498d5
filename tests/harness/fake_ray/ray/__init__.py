"""Stands for Ray where it is not installed: each node is some threads of the process that joins.

What goes wrong is told by ``FAKE_RAY``, JSON: ``init`` (``"abort"``, ``"refuse"``, ``"hang"``),
``nodes`` (their number), ``lost`` (for a node's number, the method at whose first call it dies),
``probe`` (for a node's number, what it says of itself).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from types import SimpleNamespace
from typing import Any

from ray.exceptions import ActorDiedError, RayError, RayTaskError

_script: dict[str, Any] = json.loads(os.environ.get("FAKE_RAY", "{}"))
_dead: set[str] = set()


def init(**_: object) -> None:
    print("Ray prints this, whatever it is asked for", flush=True)
    match _script.get("init"):
        case "abort":
            os._exit(3)
        case "refuse":
            raise RuntimeError("Version mismatch: The cluster was started with:\n Python: 3.9.1")
        case "hang":
            time.sleep(600)


def nodes() -> list[dict[str, Any]]:
    return [
        {
            "NodeID": str(number),
            "Alive": str(number) not in _dead,
            "Resources": {"CPU": 1.0},
            "NodeManagerHostname": f"host-{number}",
        }
        for number in range(_script.get("nodes", 2))
    ]


def get_runtime_context() -> Any:
    return SimpleNamespace(get_node_id=lambda: "0")


class _Actor:
    def __init__(self, instance: Any, node: str) -> None:
        self.instance = instance
        self.node = node

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *given: self._call(method, given))

    def _call(self, method: str, given: Sequence[Any]) -> Future[Any]:
        if self.node in _dead or _script.get("lost", {}).get(self.node) == method:
            _dead.add(self.node)
            failed: Future[Any] = Future()
            failed.set_exception(ActorDiedError("the actor died"))
            return failed
        return _in_thread(lambda: getattr(self.instance, method)(*given))


class _Remote:
    def __init__(self, what: Any, node: str = "") -> None:
        self._what = what
        self._node = node

    def options(self, *, scheduling_strategy: Any, **_: object) -> _Remote:
        return _Remote(self._what, scheduling_strategy.node_id)

    def remote(self, *given: Any) -> Any:
        if isinstance(self._what, type):
            return _Actor(self._what(*given), self._node)
        said = _script.get("probe", {})
        return _in_thread(lambda: said[self._node] if self._node in said else self._what(*given))


def remote(what: Any) -> _Remote:
    return _Remote(what)


def _in_thread(function: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait(
    references: Sequence[Future[Any]], *, num_returns: int = 1, timeout: float
) -> tuple[list[Future[Any]], list[Future[Any]]]:
    done = list(wait_for(references, timeout, FIRST_COMPLETED).done)[:num_returns]
    return done, [reference for reference in references if reference not in done]


def get(reference: Future[Any]) -> Any:
    error = reference.exception()
    if error is None or isinstance(error, RayError):
        return reference.result()
    raise RayTaskError(error)


def kill(actor: _Actor) -> None:
    actor.instance.leave()
