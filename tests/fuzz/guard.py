"""What must hold while a hostile checkpoint is read: no write elsewhere, no code run, no hang."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 30
"""Far more than any of the readers needs for a small folder, on a machine that is busy."""

MEMORY = 2 << 30
"""Bytes by which the address space may grow."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES: Mapping[str, tuple[tuple[int, int | None], ...]] = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((1, 3),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
}
"""Events of a change to the file system: which arguments are a path, and the folder it is from."""
_FOLLOW_LINKS = ("open", "os.chmod", "os.chown", "os.truncate", "os.utime")
"""Events that change what a link leads to; the others change the link itself."""
_RUNS = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "ctypes.dlopen")


class _Guard:
    """Sees what the interpreter does; hooks cannot be taken off again."""

    def __init__(self) -> None:
        self.allowed: tuple[Path, ...] = ()
        self.faults: list[str] = []
        sys.addaudithook(self._hook)
        # The interpreter's own writing, when a reader imports something for the first time.
        sys.dont_write_bytecode = True

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.allowed:
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            # A bare name is one in a folder that was opened before; the event does not say which.
            if not isinstance(arguments[0], str) or os.sep in arguments[0]:
                self._changes(event, arguments[0], -1)
        elif event in _CHANGES:
            for path, folder in _CHANGES[event]:
                self._changes(event, arguments[path], -1 if folder is None else arguments[folder])
        elif event in _RUNS:
            self.faults.append(f"{event}{arguments}")

    def _changes(self, event: str, path: Any, folder: int) -> None:
        # A descriptor was opened before, and seen then.
        if isinstance(path, int):
            return
        start = Path.cwd() if folder == -1 else Path(f"/proc/self/fd/{folder}")
        named = start / os.fsdecode(path)
        if event in _FOLLOW_LINKS:
            where = Path(os.path.realpath(named))
        else:
            where = Path(os.path.realpath(named.parent)) / named.name
        if not any(where.is_relative_to(folder) for folder in self.allowed):
            self.faults.append(f"{event} {where}")


_GUARD = _Guard()


@contextmanager
def guarded(*allowed: Path) -> Iterator[None]:
    """Fail if anything is written outside these folders, or run, or if it takes too much."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, before[1]))
    alarm = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    # Where the interpreter itself is stuck no signal is handled.
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)
    _GUARD.faults.clear()
    _GUARD.allowed = tuple(folder.resolve() for folder in allowed)
    try:
        yield
    finally:
        _GUARD.allowed = ()
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not _GUARD.faults, list(_GUARD.faults)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} seconds")


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
