"""Digests that are remembered: under what a file system does not let a program set."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from nxdi_expertscale.checkpoint import digests
from nxdi_expertscale.checkpoint.known_digests import MAX_ENTRIES, KnownDigests

LATER = time.time() + 3600
"""A time at which the changes of a test are long past."""


class Counter:
    """Computes digests, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, path: Path) -> str:
        self.calls += 1
        return digests.digest_file(path)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard"
    path.write_bytes(b"a" * 1000)
    return path


def digest(tmp_path: Path, shard: Path, counter: Counter, now: float = LATER) -> str:
    with KnownDigests(tmp_path / "known.json", compute=counter, now=lambda: now) as known:
        return known.digest(shard)


def test_a_file_is_read_once_for_all_processes_of_a_host(tmp_path: Path, shard: Path) -> None:
    counter = Counter()
    first = digest(tmp_path, shard, counter)

    assert digest(tmp_path, shard, counter) == first == digests.digest_file(shard)
    assert counter.calls == 1


def test_a_change_with_size_and_time_set_back_is_seen(tmp_path: Path, shard: Path) -> None:
    counter = Counter()
    before = shard.stat()
    first = digest(tmp_path, shard, counter)

    shard.write_bytes(b"b" * 1000)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert shard.stat().st_mtime_ns == before.st_mtime_ns
    assert digest(tmp_path, shard, counter) == digests.digest_file(shard) != first


def test_another_file_in_its_place_is_seen(tmp_path: Path, shard: Path) -> None:
    counter = Counter()
    first = digest(tmp_path, shard, counter)
    other = tmp_path / "other"
    other.write_bytes(b"c" * 1000)
    os.utime(other, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns))
    other.replace(shard)

    assert digest(tmp_path, shard, counter) != first


def test_a_change_of_this_moment_is_not_remembered(tmp_path: Path, shard: Path) -> None:
    counter = Counter()
    now = shard.stat().st_ctime

    digest(tmp_path, shard, counter, now)
    digest(tmp_path, shard, counter, now)

    assert counter.calls == 2


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, shard: Path
) -> None:
    def change(path: Path) -> str:
        found = digests.digest_file(path)
        path.write_bytes(b"longer" * 1000)
        return found

    with KnownDigests(tmp_path / "known.json", compute=change, now=lambda: LATER) as known:
        first = known.digest(shard)
        assert known.digest(shard) != first


def test_processes_add_to_what_others_remember(tmp_path: Path, shard: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"other")
    counter = Counter()
    file = tmp_path / "known.json"
    one = KnownDigests(file, compute=counter, now=lambda: LATER)
    two = KnownDigests(file, compute=counter, now=lambda: LATER)
    one.digest(shard)
    two.digest(other)
    one.save()
    two.save()

    with KnownDigests(file, compute=counter, now=lambda: LATER) as known:
        known.digest(shard)
        known.digest(other)
    assert counter.calls == 2


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2, "digests": {}}', '{"format": 1, "digests": 3}']
)
def test_a_damaged_memory_is_made_anew(tmp_path: Path, shard: Path, content: str) -> None:
    (tmp_path / "known.json").write_text(content)
    counter = Counter()

    digest(tmp_path, shard, counter)
    digest(tmp_path, shard, counter)

    assert counter.calls == 1


def test_a_cache_that_cannot_be_written_is_said(
    tmp_path: Path, shard: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    known = KnownDigests(tmp_path / "file" / "known.json", now=lambda: LATER)

    assert known.digest(shard) == digests.digest_file(shard)
    known.save()
    assert "XDG_CACHE_HOME" in caplog.text


def test_it_is_kept_in_the_users_cache(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with KnownDigests(now=lambda: LATER) as known:
        known.digest(shard)

    (file,) = (tmp_path / "cache" / "nxdi-expertscale").glob("*.json")
    assert digests.digest_file(shard) in file.read_text()
    assert stat.S_ISREG(file.stat().st_mode)


def test_the_memory_does_not_grow_without_end(tmp_path: Path, shard: Path) -> None:
    file = tmp_path / "known.json"
    entries = ", ".join(f'"{number}": "x"' for number in range(MAX_ENTRIES))
    file.write_text(f'{{"format": 1, "digests": {{{entries}}}}}')

    digest(tmp_path, shard, Counter())

    assert '"0": "x"' not in file.read_text()
    assert digests.digest_file(shard) in file.read_text()


def test_user_without_a_home_folder_is_warned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    (tmp_path / "file").write_bytes(b"content")

    with KnownDigests() as known:
        known.digest(tmp_path / "file")

    assert "set XDG_CACHE_HOME to a folder" in caplog.text
