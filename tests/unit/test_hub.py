"""Checkpoints of a Hub on loopback, through the real client: quantize, verify, inspect, preview."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nxdi_expertscale.checkpoint import (
    inspect_checkpoint,
    quantize_checkpoint,
    read_manifest,
    run_dry,
    verify_checkpoint,
)
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST
from nxdi_expertscale.checkpoint.write.staging import CARD
from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from nxdi_expertscale.sources import hub as hub_source
from nxdi_expertscale.sources import remote, spool
from nxdi_expertscale.sources.locate import open_source
from tests.harness import checkpoints, loopback_hub
from tests.harness.loopback_hub import COMMIT, Hub

constants = pytest.importorskip("huggingface_hub.constants")
file_download = pytest.importorskip("huggingface_hub.file_download")

MODEL = "org/small"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model, whose client waits for nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 0.0)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with loopback_hub.serve() as served:
        served.models[MODEL] = checkpoints.save(tmp_path / "src")
        template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield served


def weights(folder: Path) -> dict[str, bytes]:
    """Every file but manifest and card, which say where the rest was made from."""
    files = checkpoints.contents(folder)
    return {name: files[name] for name in files if name not in (MANIFEST, CARD)}


def test_a_model_of_the_hub_becomes_what_its_folder_does(hub: Hub, tmp_path: Path) -> None:
    quantize_checkpoint(hub.models[MODEL], tmp_path / "from-folder")

    quantize_checkpoint(MODEL, tmp_path / "from-hub", spool=tmp_path)

    assert weights(tmp_path / "from-hub") == weights(tmp_path / "from-folder")
    assert read_manifest(tmp_path / "from-hub").origin == f"hf://{MODEL}@{COMMIT}"
    assert read_manifest(tmp_path / "from-folder").origin is None
    assert verify_checkpoint(tmp_path / "from-hub", MODEL).faults == ()
    assert inspect_checkpoint(MODEL).layers == inspect_checkpoint(hub.models[MODEL]).layers
    assert all(COMMIT in path for path, part in hub.asked if part is not None)


def test_connections_that_break_and_servers_that_are_busy_change_nothing(
    hub: Hub, tmp_path: Path
) -> None:
    quantize_checkpoint(hub.models[MODEL], tmp_path / "calm")
    hub.faults += [503, "break", 429, "break", "break", 500]

    quantize_checkpoint(MODEL, tmp_path / "rough")

    assert hub.faults == []
    assert weights(tmp_path / "rough") == weights(tmp_path / "calm")


def test_a_range_that_broke_is_resumed_where_it_broke(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What was received of a piece is lost with it.
    monkeypatch.setattr(hub_source, "_PIECE_BYTES", 10)
    shard = "model-00001-of-00003.safetensors"
    with open_source(MODEL) as source:
        size = source.size(shard) // 20 * 20
        hub.faults += ["break"]
        content = source.read_range(shard, 0, size)

    assert content == (hub.models[MODEL] / shard).read_bytes()[:size]
    assert hub.ranges(shard) == [f"bytes=0-{size - 1}", f"bytes={size // 2}-{size - 1}"]


def test_a_server_that_stays_away_is_one_line_and_the_same_call_goes_on_later(
    hub: Hub, tmp_path: Path
) -> None:
    def go_away(done: int, total: int) -> None:
        hub.is_away = done > total // 2

    hub_with_blocks = pytest.MonkeyPatch()
    hub_with_blocks.setattr(spool, "BLOCK_BYTES", 4096)
    hub_with_blocks.setattr(spool, "BLOCKS_AHEAD", 1)
    with hub_with_blocks.context() as small_blocks:
        small_blocks.setattr(spool, "MAX_BLOCKS", 4)
        arguments = {"max_shard_bytes": 20_000, "workers": 1}
        with pytest.raises(CheckpointError, match="the server answers 503, at 8 attempts; run the"):
            quantize_checkpoint(MODEL, tmp_path / "dst", progress=go_away, **arguments)
        hub.is_away = False

        result = quantize_checkpoint(MODEL, tmp_path / "dst", **arguments)
    hub_with_blocks.undo()

    assert result.resumed_shards > 0
    assert verify_checkpoint(tmp_path / "dst", hub.models[MODEL]).faults == ()


def test_blocks_that_were_used_make_room_for_the_next(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(spool, "MAX_BLOCKS", 3)
    quantize_checkpoint(hub.models[MODEL], tmp_path / "from-folder")
    (tmp_path / "spool").mkdir()

    quantize_checkpoint(MODEL, tmp_path / "from-hub", spool=tmp_path / "spool", workers=8)

    assert weights(tmp_path / "from-hub") == weights(tmp_path / "from-folder")
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_preview_reads_headers_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    preview = run_dry(MODEL, tmp_path / "dst", workers=2)
    made = quantize_checkpoint(hub.models[MODEL], tmp_path / "dst")

    assert preview.tensors == made.tensors
    assert (preview.source_bytes, preview.output_bytes) == (made.source_bytes, made.output_bytes)
    assert preview.origin == f"hf://{MODEL}@{COMMIT}"
    assert preview.spool_bytes == 3 * spool.BLOCK_BYTES
    for shard in hub.models[MODEL].glob("*.safetensors"):
        length = int.from_bytes(shard.read_bytes()[:8], "little")
        assert set(hub.ranges(shard.name)) == {"bytes=0-7", f"bytes=8-{7 + length}"}


def test_what_the_hubs_cache_has_is_read_from_there(hub: Hub, tmp_path: Path) -> None:
    shard = "model-00001-of-00003.safetensors"
    snapshot = tmp_path / "cache" / "models--org--small" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / shard).write_bytes((hub.models[MODEL] / shard).read_bytes())

    quantize_checkpoint(MODEL, tmp_path / "dst")

    assert hub.ranges(shard) == []
    assert verify_checkpoint(tmp_path / "dst", hub.models[MODEL]).faults == ()


def test_offline_a_model_is_its_folder_in_the_hubs_cache(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, and the Hub's cache does"):
        quantize_checkpoint(MODEL, tmp_path / "dst")
    model = tmp_path / "cache" / "models--org--small"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    checkpoints.save(model / "snapshots" / COMMIT)

    quantize_checkpoint(MODEL, tmp_path / "dst")

    assert read_manifest(tmp_path / "dst").origin == f"hf://{MODEL}@{COMMIT}"
    assert hub.asked == []


def test_a_renamed_model_is_followed_and_recorded_under_its_new_name(
    hub: Hub, tmp_path: Path
) -> None:
    hub.renamed["org/old"] = MODEL

    quantize_checkpoint("org/old@main", tmp_path / "dst")

    assert read_manifest(tmp_path / "dst").origin == f"hf://{MODEL}@{COMMIT}"


def test_a_gated_model_is_read_with_the_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add(MODEL)
    with pytest.raises(CheckpointError, match=r"org/small: is gated, .* set HF_TOKEN"):
        quantize_checkpoint(MODEL, tmp_path / "dst")

    monkeypatch.setenv("HF_TOKEN", hub.token)
    quantize_checkpoint(MODEL, tmp_path / "dst")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/other", "org/other: there is no folder of this name here, and no model on the Hub"),
        (f"{MODEL}@v9", f"{MODEL}@v9: the model has no revision v9"),
        ("org/a--b", "org/a--b: is neither a folder nor a model's name on the Hub"),
    ],
)
def test_a_name_that_is_nothing_is_refused(
    hub: Hub, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(name, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_folder_goes_before_a_model_of_its_name(hub: Hub, tmp_path: Path) -> None:
    checkpoints.save(tmp_path / MODEL)

    quantize_checkpoint(MODEL, tmp_path / "dst")

    assert hub.asked == []


def test_without_the_client_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'nxdi-expertscale\[hub\]'"):
        quantize_checkpoint(MODEL, tmp_path / "dst")


def test_a_spool_that_is_no_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: is not a folder; name another with spool"):
        quantize_checkpoint(MODEL, tmp_path / "dst", spool=tmp_path / "nowhere")


def test_nothing_of_a_spool_or_a_source_stays_open(hub: Hub, tmp_path: Path) -> None:
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("this system does not list open files")

    quantize_checkpoint(MODEL, tmp_path / "dst", spool=tmp_path)

    targets = [str(path.readlink()) for path in open_files.iterdir() if path.is_symlink()]
    assert [target for target in targets if str(tmp_path) in target] == []


def test_the_command_takes_an_id_and_says_what_the_spool_needs(hub: Hub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nxdi_expertscale", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )

    preview = run("quantize", MODEL, "dst", "--dry-run", "--json")
    made = run("quantize", MODEL, "dst", "--spool", str(tmp_path))

    assert json.loads(preview.stdout)["tensors"]["quantized experts"] == 24
    assert made.returncode == 0, made.stderr
    assert f"is read through {tmp_path}, of which it takes up to 2.15 GB" in made.stderr
    assert read_manifest(tmp_path / "dst").origin == f"hf://{MODEL}@{COMMIT}"


WAITING = """
import sys
import time
from nxdi_expertscale.cli import main
from nxdi_expertscale.sources import remote

remote.FIRST_WAIT_SECONDS = remote.LONGEST_WAIT_SECONDS = 1e6
open_files = remote.RemoteFiles.__init__

def open_when_told(*arguments):
    remote.RemoteFiles.__init__ = open_files
    print("opening", flush=True)
    sys.stdin.readline()
    open_files(*arguments)

remote.RemoteFiles.__init__ = open_when_told
main(sys.argv[1:])
"""
"""The command, which waits for a line before it reads weights, and then for a server for ever."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_does_not_wait_for_a_server_that_is_away(
    number: signal.Signals, hub: Hub, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "quantize", MODEL, "dst"],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "opening\n"
    hub.asked.clear()
    hub.is_away = True
    process.stdin.write("\n")
    process.stdin.flush()
    while not hub.asked:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate()
    hub.is_away = False

    assert process.returncode == 130
    assert stderr.splitlines()[1:] == [
        "nxdi-expertscale: interrupted; the same command goes on from here"
    ]
    quantize_checkpoint(MODEL, tmp_path / "dst")
    assert verify_checkpoint(tmp_path / "dst").faults == ()
