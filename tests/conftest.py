"""What holds for every test: one thread, a cache of its own, and how they are spread out."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Generator, Iterator
from typing import Any

import pytest

# Before torch is imported, here and in processes of the tests: the models are too small for
# threads to be of use, and on a busy machine threads that wait for each other cost much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job ignores interrupts, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the user's cache alone, in this process and in those that it starts."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# A wrapper comes before every other hook, pytest-xdist's own among them, which reads the groups.
@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, None, None]:
    """Let pytest-xdist keep together the tests of a file, and those that share a target's process.

    A target has two, so that those of the double, a third of all tests, take no longer than the
    rest beside them.
    """
    for item in items:
        callspec: Any = getattr(item, "callspec", None)
        target = None if callspec is None else callspec.params.get("target_name")
        half = zlib.crc32(item.path.stem.encode()) % 2
        group = item.path.stem if target is None else f"{target}-{half}"
        item.add_marker(pytest.mark.xdist_group(group))
    return (yield)
