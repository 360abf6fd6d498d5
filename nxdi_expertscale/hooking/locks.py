"""Locks that a forked child finds free."""

from __future__ import annotations

import os
import threading


def fork_safe_lock() -> threading.RLock:
    """A lock that is held while this process forks, for the rest of the process.

    No other thread is then in the midst of a change that the child would inherit half made, and
    the child never waits for a thread that it does not have.
    """
    lock = threading.RLock()
    os.register_at_fork(
        before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
    )
    return lock
