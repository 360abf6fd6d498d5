"""Checkpoints in S3, read and written through the real boto3, on a server on loopback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nxdi_expertscale.checkpoint import (
    inspect_checkpoint,
    quantize_checkpoint,
    run_dry,
    verify_checkpoint,
)
from nxdi_expertscale.checkpoint.write import s3_staging
from nxdi_expertscale.checkpoint.write import staging as staging_module
from nxdi_expertscale.checkpoint.write.s3_staging import S3Folder
from nxdi_expertscale.checkpoint.write.staging import CARD
from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from nxdi_expertscale.sources import remote
from nxdi_expertscale.sources.locate import open_source
from tests.harness import checkpoints, loopback_s3
from tests.harness.loopback_s3 import S3, Stored

boto3 = pytest.importorskip("boto3")

SRC, DST = "s3://bucket/models/small", "s3://bucket/models/small-fp8"
MANIFEST = "nxdi_expertscale.json"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An S3 with one model, whose client waits for nothing and tries once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 0.0)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    with loopback_s3.serve() as served:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", served.url)
        put(served, checkpoints.save(tmp_path / "src"), "models/small")
        yield served


def put(server: S3, folder: Path, prefix: str) -> None:
    for path in folder.iterdir():
        server.objects["bucket", f"{prefix}/{path.name}"] = Stored(path.read_bytes(), {})


def contents(server: S3, prefix: str = "models/small-fp8") -> dict[str, bytes]:
    return {
        key.removeprefix(f"{prefix}/"): stored.content
        for (_, key), stored in server.objects.items()
        if key.startswith(f"{prefix}/")
    }


def without_manifest(files: dict[str, bytes]) -> dict[str, bytes]:
    """All files but those that say where the rest was made from."""
    return {name: files[name] for name in files if name not in (MANIFEST, CARD)}


@pytest.fixture
def expected(server: S3, tmp_path: Path) -> dict[str, bytes]:
    quantize_checkpoint(tmp_path / "src", tmp_path / "expected")
    return without_manifest(checkpoints.contents(tmp_path / "expected"))


def test_s3_gives_and_takes_the_bytes_of_a_folder(
    server: S3, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    assert quantize_checkpoint(SRC, DST, spool=tmp_path).destination == DST
    quantize_checkpoint(tmp_path / "src", f"{DST}-2/")
    quantize_checkpoint(SRC, tmp_path / "here")

    assert without_manifest(contents(server)) == expected
    assert without_manifest(contents(server, "models/small-fp8-2")) == expected
    assert without_manifest(checkpoints.contents(tmp_path / "here")) == expected
    assert verify_checkpoint(DST, SRC).faults == ()
    assert inspect_checkpoint(DST).folder == DST
    assert server.uploads == {}


def test_the_index_and_then_the_manifest_appear_last(server: S3) -> None:
    quantize_checkpoint(SRC, DST)

    visible = [key for key in server.written if staging_module.WORK not in key]
    assert visible[-2:] == [
        f"models/small-fp8/{name}" for name in ("model.safetensors.index.json", MANIFEST)
    ]


def test_large_files_go_in_parts(
    server: S3, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    in_parts(monkeypatch)

    quantize_checkpoint(SRC, DST)

    assert without_manifest(contents(server)) == expected
    assert server.uploads == {}


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every object uploaded in parts, as large ones are, and copied whole."""
    transfer = pytest.importorskip("boto3.s3.transfer")

    def config(*, for_copies: bool = False) -> Any:
        return transfer.TransferConfig(multipart_threshold=1 << 40 if for_copies else 1)

    monkeypatch.setattr(s3_staging, "transfer_config", config)


def test_reads_that_break_change_nothing(server: S3, expected: dict[str, bytes]) -> None:
    server.faults += [503, "break", "break", 500, "break"]

    quantize_checkpoint(SRC, DST)

    assert server.faults == []
    assert without_manifest(contents(server)) == expected


@pytest.mark.parametrize("writes", range(1, 16, 3))
def test_a_run_that_is_cut_off_anywhere_is_never_loadable_and_goes_on(
    server: S3, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], writes: int
) -> None:
    class Killed(BaseException):
        pass

    left = [writes]
    for name in ("upload", "move"):
        original = getattr(S3Folder, name)

        def cut_off(*arguments: Any, original: Any = original) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            original(*arguments)

        monkeypatch.setattr(S3Folder, name, cut_off)
    server.uploads["orphan"] = ("bucket", "models/small-fp8/.nxdi-expertscale/x", {}, {})

    with pytest.raises(Killed):
        quantize_checkpoint(SRC, DST, max_shard_bytes=20_000)
    assert MANIFEST not in contents(server)
    left[0] = 1000
    quantize_checkpoint(SRC, DST, max_shard_bytes=20_000)

    found = contents(server)
    assert verify_checkpoint(DST, SRC).faults == ()
    assert not [name for name in found if name.startswith(staging_module.WORK)]
    assert server.uploads == {}


def test_shards_of_an_earlier_run_are_used(server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    original = S3Folder.move

    def fail(*_: object) -> None:
        raise CheckpointError("the network is away")

    monkeypatch.setattr(S3Folder, "move", fail)
    with pytest.raises(CheckpointError):
        quantize_checkpoint(SRC, DST, max_shard_bytes=20_000)
    monkeypatch.setattr(S3Folder, "move", original)
    del server.objects["bucket", f"models/small-fp8/{staging_module.WORK}/{MANIFEST}"]

    result = quantize_checkpoint(SRC, DST, max_shard_bytes=20_000)

    assert result.resumed_shards == result.shards > 1


def test_what_is_there_is_not_written_over(server: S3) -> None:
    quantize_checkpoint(SRC, DST)
    with pytest.raises(CheckpointError, match="small-fp8: is a finished checkpoint; name another"):
        quantize_checkpoint(SRC, DST)
    quantize_checkpoint(SRC, DST, overwrite=True, modules_to_not_convert=["lm_head"])
    assert verify_checkpoint(DST, SRC).faults == ()

    server.objects["bucket", "models/small-fp8/adapter_config.json"] = Stored(b"{}", {})
    with pytest.raises(CheckpointError, match="is no part of the checkpoint that is to"):
        quantize_checkpoint(SRC, DST, overwrite=True)
    server.objects["bucket", "other/notes.txt"] = Stored(b"mine", {})
    with pytest.raises(CheckpointError, match="is not empty and was not made by"):
        quantize_checkpoint(SRC, "s3://bucket/other")
    for place in (SRC, f"{SRC}/inside", "s3://bucket/models"):
        with pytest.raises(CheckpointError, match=r"is the source .*, or one lies in the other"):
            quantize_checkpoint(SRC, place)


def test_an_object_that_is_replaced_meanwhile_is_noticed(server: S3) -> None:
    with open_source(SRC) as source:
        server.objects["bucket", "models/small/config.json"].content = b"{}"
        with pytest.raises(CheckpointError, match=r"config\.json: was changed while it was read"):
            source.read("config.json", limit=10_000)


def test_parts_that_are_refused_are_one_line_and_leave_none_behind(
    server: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch)
    server.refuse_parts = True

    with pytest.raises(CheckpointError, match=r"\.nxdi-expertscale: S3 answers AccessDenied"):
        quantize_checkpoint(SRC, DST)

    assert server.uploads == {}


def test_a_preview_says_what_waits_on_this_host(server: S3) -> None:
    found = run_dry(SRC, DST)

    assert (found.source, found.origin, found.destination) == (SRC, SRC, DST)
    assert found.disk_bytes == found.output_bytes
    assert found.spool_bytes > 0
    assert contents(server) == {}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://bucket/nothing", "s3://bucket/nothing: there is nothing there; look at the name"),
        ("s3:///x", "names no bucket"),
        ("s3://B AD/x", "s3://B AD/x: is no place in S3"),
    ],
)
def test_a_place_that_is_none_is_refused(
    server: S3, tmp_path: Path, place: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(place, tmp_path / "dst")


def test_without_credentials_one_line_says_so(
    server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(CheckpointError, match="there are no credentials for AWS"):
        quantize_checkpoint(SRC, tmp_path / "dst")


def test_without_boto3_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'nxdi-expertscale\[s3\]'"):
        quantize_checkpoint(SRC, tmp_path / "dst")
