"""Where what is read from afar lies meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nxdi_expertscale.checkpoint.write.locate import spool_for
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.sources.spool import is_in_memory, spool_folder
from nxdi_expertscale.sources.user_cache import user_cache


def test_the_spool_is_on_the_disk_of_the_folder_that_is_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()

    assert spool_for(tmp_path / "there", None) == tmp_path / "there"
    assert spool_for(str(tmp_path / "new" / "folder"), None) == tmp_path
    assert spool_for(tmp_path / "there", tmp_path) == tmp_path


def test_the_spool_is_in_the_users_cache_where_no_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    assert spool_for("s3://bucket/made", None) == spool_folder(None) == user_cache()
    assert user_cache().is_dir()


def test_a_cache_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    with pytest.raises(CheckpointError, match="the spool cannot be written there"):
        spool_folder(None)


@pytest.mark.parametrize(("kind", "expected"), [("tmpfs", True), ("ext4", False)])
def test_a_folder_in_memory_is_told_from_one_on_a_disk(
    kind: str, expected: bool, tmp_path: Path
) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"21 1 0:999 / /elsewhere rw shared:1 - {'ext4' if expected else 'tmpfs'} none rw\n"
        f"22 1 {os.major(device)}:{os.minor(device)} / /here rw shared:2 - {kind} none rw\n"
    )

    assert is_in_memory(tmp_path, mounts) is expected
    assert not is_in_memory(tmp_path, tmp_path / "nothing")
