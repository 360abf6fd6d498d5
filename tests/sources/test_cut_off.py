"""Checkpoints of a Hub and of moto's S3: the same bytes each way, however often a run is killed."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from moto.server import ThreadedMotoServer

from nxdi_expertscale.checkpoint import quantize_checkpoint, verify_checkpoint
from nxdi_expertscale.checkpoint.write import s3_staging
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST
from nxdi_expertscale.checkpoint.write.staging import CARD, WORK
from tests.harness import checkpoints, loopback_hub, processes

KILLS = int(os.environ.get("NXDI_EXPERTSCALE_KILLS", "12"))
"""How often a run is killed on each way; more in the environment for a long test."""

BUCKET, MODEL, INDEX = "models", "org/small", "model.safetensors.index.json"
SETTINGS: dict[str, Any] = {"max_shard_bytes": 20_000, "workers": 2}

Files = dict[str, bytes]


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a server with one empty bucket; the environment leads there."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    try:
        yield client
    finally:
        client.close()
        server.stop()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of a process that finds the model on a Hub on loopback."""
    monkeypatch.chdir(tmp_path)
    with loopback_hub.serve() as served:
        served.models[MODEL] = tmp_path / "src"
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        yield


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "src")


@pytest.fixture
def expected(src: Path, tmp_path: Path) -> Files:
    quantize_checkpoint(src, tmp_path / "expected", **SETTINGS)
    return without_manifest(checkpoints.contents(tmp_path / "expected"))


def without_manifest(files: Files) -> Files:
    """All files but those that say where the rest was made from."""
    return {name: files[name] for name in files if name not in (MANIFEST, CARD)}


def put(s3: Any, folder: Path, prefix: str) -> str:
    for path in folder.iterdir():
        s3.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
    return f"s3://{BUCKET}/{prefix}"


def stored(s3: Any, prefix: str) -> Files:
    """Every object below a prefix, hidden ones too."""
    listed = s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", ())
    return {
        entry["Key"].removeprefix(f"{prefix}/"): s3.get_object(Bucket=BUCKET, Key=entry["Key"])[
            "Body"
        ].read()
        for entry in listed
    }


def uploads(s3: Any) -> list[Any]:
    """The uploads that were begun and not finished."""
    found: list[Any] = s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    return found


@pytest.fixture(autouse=True)
def _no_leftover_server() -> Iterator[None]:
    yield
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def run(src: str, dst: str) -> None:
    """Quantize, with every object uploaded in parts as large ones are."""
    s3_staging.transfer_config = lambda **_: TransferConfig(multipart_threshold=1)
    quantize_checkpoint(src, dst, overwrite=True, **SETTINGS)


def kill_and_complete(src: str, dst: str, found: Callable[[], Files], expected: Files) -> None:
    """Run until it was killed so many times, and then to its end; what loads is always whole."""
    context = processes.quantizing_context()
    chance, longest, kills = random.Random(0), 0.0, 0
    while kills < KILLS:
        process = context.Process(target=run, args=(src, dst))
        process.start()
        started = time.monotonic()
        # The first is left alone, and shows how long one takes on this machine.
        process.join(chance.uniform(0, longest) if longest else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            longest = 1.2 * (time.monotonic() - started)
        left = found()
        if INDEX in left:
            assert {name: left.get(name) for name in expected} == expected
    run(src, dst)


def test_each_way_gives_the_same_bytes(
    s3: Any, hub: None, src: Path, tmp_path: Path, expected: Files
) -> None:
    source = put(s3, src, "small")
    for number, start in enumerate((str(src), source)):
        quantize_checkpoint(start, f"s3://{BUCKET}/made-{number}", **SETTINGS)
        assert without_manifest(stored(s3, f"made-{number}")) == expected
    quantize_checkpoint(source, tmp_path / "here", **SETTINGS)

    assert without_manifest(checkpoints.contents(tmp_path / "here")) == expected
    assert verify_checkpoint(f"s3://{BUCKET}/made-1", source).faults == ()
    assert uploads(s3) == []


def test_runs_from_s3_to_s3_that_are_killed_leave_nothing_but_the_result(
    s3: Any, src: Path, expected: Files
) -> None:
    source = put(s3, src, "small")

    kill_and_complete(source, f"s3://{BUCKET}/made", lambda: stored(s3, "made"), expected)

    assert without_manifest(stored(s3, "made")) == expected
    assert uploads(s3) == []


def test_runs_from_the_hub_that_are_killed_leave_nothing_but_the_result(
    hub: None, src: Path, tmp_path: Path, expected: Files
) -> None:
    dst = tmp_path / "made"

    def found() -> Files:
        # A file may be moved to its place between a look at the names and one at the content.
        while True:
            try:
                return checkpoints.contents(dst) if dst.exists() else {}
            except FileNotFoundError:
                continue

    kill_and_complete(MODEL, str(dst), found, expected)

    assert without_manifest(checkpoints.contents(dst)) == expected
    assert not any(name.startswith(WORK) for name in checkpoints.contents(dst))
