"""Digests of files, each computed once for a host and remembered in the user's cache.

A digest is remembered under what a file system does not let a program set; see
:func:`~nxdi_expertscale.sources.folder.file_identity`.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock

from nxdi_expertscale.checkpoint import digests
from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.sources.closing import Closing
from nxdi_expertscale.sources.folder import file_identity
from nxdi_expertscale.sources.user_cache import user_cache

_logger = logging.getLogger("nxdi_expertscale")

FILE = "digests.json"
FORMAT = 1

MAX_ENTRIES = 1 << 16
"""Of these, the latest are kept: a few hundred checkpoints of a few hundred files."""

SETTLED_SECONDS = 2.0
"""How old a change has to be before a digest is remembered.

File systems count time in ticks: a second change in the tick of the first would not show.
"""


class KnownDigests(Closing):
    """Digests of files by the identity of the file; a context that saves what is new at its end.

    Safe to use from several threads. Several processes may save to the same file: each adds what
    it found.
    """

    def __init__(
        self,
        file: Path | None = None,
        *,
        compute: Callable[[Path], str] = digests.digest_file,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Load what is remembered.

        Args:
            file: Where it is kept; by default :data:`FILE` in the user's cache.
            compute: Gives the digest of a file's content, in hexadecimal.
            now: Gives the time in seconds since the epoch.
        """
        self._file = _default_file() if file is None else file
        self._compute = compute
        self._now = now
        self._known = {} if self._file is None else _read(self._file)
        self._new: dict[str, str] = {}
        self._lock = threading.Lock()

    def digest(self, path: Path) -> str:
        """Digest of a file's content, in hexadecimal; read only where it is not known.

        Args:
            path: The file; a symbolic link stands for what it leads to.

        Raises:
            OSError: It cannot be read.
        """
        return self._answer(lambda: _identity(path.stat()), [path], lambda: self._compute(path))

    def answer(self, question: str, files: Sequence[Path], find_out: Callable[[], str]) -> str:
        """The answer to a question that nothing but the content of some files decides.

        Args:
            question: The question.
            files: All the files that decide it.
            find_out: Gives the answer, where it is not known.

        Raises:
            OSError: A file is gone.
        """

        def key() -> str:
            identities = [f"{path.name}={_identity(path.stat())}" for path in sorted(files)]
            return digests.digest("\n".join([question, *identities]).encode()).hex()

        return self._answer(key, files, find_out)

    def _answer(
        self, key: Callable[[], str], files: Sequence[Path], find_out: Callable[[], str]
    ) -> str:
        before = key()
        with self._lock:
            known = self._known.get(before)
        if known is not None:
            return known
        found = find_out()
        statuses = [path.stat() for path in files]
        changed = max(max(status.st_mtime, status.st_ctime) for status in statuses)
        if key() == before and changed < self._now() - SETTLED_SECONDS:
            with self._lock:
                self._known[before] = self._new[before] = found
        return found

    def save(self) -> None:
        """Add what is new to the file.

        Where the user's cache cannot be written, a warning says that files will be read again.
        """
        if not self._new or self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self._file.with_suffix(".lock")):
                entries = [*(_read(self._file) | self._new).items()][-MAX_ENTRIES:]
                content = json.dumps({"format": FORMAT, "digests": dict(entries)})
                partial = self._file.with_suffix(".partial")
                partial.write_text(content, encoding="utf-8")
                partial.replace(self._file)
        except OSError as error:
            _logger.warning(
                "%s cannot be written (%s): files of weights will be read in full again at the "
                "next start; set XDG_CACHE_HOME to a folder that can be written",
                self._file,
                error.strerror,
            )
        self._new.clear()

    def close(self) -> None:
        """Save what is new."""
        self.save()


def _identity(status: os.stat_result) -> str:
    # The name of the host, because homes are shared between hosts and device numbers are not.
    return f"{platform.node()}:{file_identity(status)}"


def _default_file() -> Path | None:
    """The file in the user's cache; None where there can be none, with a warning."""
    try:
        return user_cache() / FILE
    except ConfigurationError as error:
        _logger.warning("files of weights are read in full at each start: %s", error)
        return None


def _read(file: Path) -> dict[str, str]:
    """What a file remembers; nothing where there is none, or where it is damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            return {}
        return {str(key): str(digest) for key, digest in value["digests"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _logger.warning("%s cannot be read, and is made anew: %s", file, error)
        return {}
