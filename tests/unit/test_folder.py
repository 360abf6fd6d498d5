"""Files of a local folder; what leads out of it is in ``test_source``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.sources.folder import Folder, open_folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "b").write_bytes(bytes(range(100)))
    (tmp_path / "a").write_bytes(b"small")
    return open_folder(tmp_path)


def test_names_and_sizes(folder: Folder) -> None:
    assert folder.names() == ["a", "b"]
    assert (folder.size("a"), folder.size("b")) == (5, 100)
    assert folder.has("a")
    assert not folder.has("c")
    os.utime(folder.path / "a", ns=(1, 123456789))
    assert folder.mtime_ns("a") == 123456789


def test_a_link_to_the_folder_is_followed(
    folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(folder.path)

    assert open_folder(link) == folder


def test_a_small_file_is_read_whole_or_not_at_all(folder: Folder) -> None:
    assert folder.read("a", limit=5) == b"small"
    with pytest.raises(CheckpointError, match="a: is too long to be a real one"):
        folder.read("a", limit=4)


def test_a_range_ends_with_the_file(folder: Folder) -> None:
    assert folder.read_range("b", 97, 2) == bytes([97, 98])
    assert folder.read_range("b", 97, 20) == bytes([97, 98, 99])


def test_open_files_fill_buffers(folder: Folder) -> None:
    buffer = bytearray(3)
    with folder.open(["b", "a"]) as files:
        files.read_into(memoryview(buffer), "b", 10)
        assert bytes(buffer) == bytes([10, 11, 12])
        with pytest.raises(CheckpointError, match="a: was truncated while it was read"):
            files.read_into(memoryview(buffer), "a", 4)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_file_stays_open(folder: Folder) -> None:
    before = open_descriptors()
    with folder.open(["a", "b"]):
        assert open_descriptors() == before + 2
    with pytest.raises(CheckpointError, match="c: is missing"):
        folder.open(["a", "b", "c"])

    assert open_descriptors() == before


def test_open_files_fill_buffers_without_preadv(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")

    test_open_files_fill_buffers(folder)


def test_a_name_that_is_not_utf8_is_refused(folder: Folder) -> None:
    (folder.path / os.fsdecode(b"tokenizer\xff.json")).touch()

    with pytest.raises(CheckpointError, match="has a name that is not UTF-8; rename or remove it"):
        folder.names()
