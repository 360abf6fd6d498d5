from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.errors import CheckpointError
from tests.harness import checkpoints

COMMAND = [sys.executable, "-m", "nxdi_expertscale"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def assert_refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "src")


def test_a_checkpoint_is_quantized_verified_and_described(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"

    made = run("quantize", src, dst, "--modules-to-not-convert", "lm_head", "--workers", 2)
    assert (made.returncode, made.stderr) == (0, "")
    assert "quantized experts  24 tensors" in made.stdout

    verified = run("verify", dst, "--against", src, "--json")
    assert verified.returncode == 0
    assert json.loads(verified.stdout)["faults"] == []

    inspected = run("inspect", dst, "--json")
    assert inspected.returncode == 0
    assert len(json.loads(inspected.stdout)["layers"]) == checkpoints.LAYERS


def test_a_fault_is_an_answer_and_no_error(src: Path, tmp_path: Path) -> None:
    dst = quantize_checkpoint(src, tmp_path / "dst").destination
    (dst / "tokenizer.json").write_text("{}")

    result = run("verify", dst)

    assert (result.returncode, result.stderr) == (1, "")
    assert "tokenizer.json: has 2 bytes" in result.stdout


def test_a_name_that_no_module_has_is_warned_of(src: Path, tmp_path: Path) -> None:
    result = run("quantize", src, tmp_path / "dst", "--modules-to-not-convert", "layers.7")

    assert result.returncode == 0
    assert "is named 'layers.7'" in result.stderr


def test_bad_input_gets_one_line_and_leaves_nothing(src: Path, tmp_path: Path) -> None:
    shard = src / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])

    assert_refused(run("quantize", src, tmp_path / "dst"), f"{shard}: the header describes")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("command", ["verify", "neuron-config"])
def test_a_folder_that_is_not_ours_is_refused(src: Path, command: str) -> None:
    assert_refused(run(command, src), f"{src}: was not made by nxdi-expertscale quantize")


def test_an_interrupt_ends_it_cleanly_and_the_next_run_goes_on(tmp_path: Path, big: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "quantize", big, tmp_path / "dst", "--workers", "1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "dst", process)
    process.send_signal(signal.SIGINT)

    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert stderr.strip() == "nxdi-expertscale: interrupted"
    assert run("quantize", big, tmp_path / "dst").returncode == 0
    assert run("verify", tmp_path / "dst", "--against", big).returncode == 0


def test_the_second_of_two_runs_stops(tmp_path: Path, big: Path) -> None:
    first = subprocess.Popen(
        [*COMMAND, "quantize", big, tmp_path / "dst", "--workers", "1"], stdout=subprocess.DEVNULL
    )
    wait_for(tmp_path / "dst", first)
    first.send_signal(signal.SIGSTOP)  # so that it is still there when the second has started
    try:
        second = run("quantize", big, tmp_path / "dst")
    finally:
        first.send_signal(signal.SIGCONT)

    assert_refused(second, "another run is writing to it")
    assert first.wait(timeout=120) == 0
    assert run("verify", tmp_path / "dst").returncode == 0


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes a second or so: one of 400 MB, with a large head."""
    import torch

    values = checkpoints.tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        values[name] = torch.ones(2_000_000, checkpoints.HIDDEN, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("big") / "src"
    return checkpoints.save(folder, values, config={"vocab_size": 2_000_000})


def wait_for(dst: Path, process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Until a run writes its first shard."""
    deadline = time.monotonic() + 60
    while not list(dst.glob(".nxdi-expertscale/*.safetensors")):
        assert process.poll() is None, "the run ended before it was looked at"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs takes root")
def test_a_full_disk_leaves_nothing_that_loads_and_the_next_run_goes_on(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        from nxdi_expertscale.checkpoint import quantize

        assert_refused(run("quantize", src, disk / "dst"), "are free; free some space")
        assert list(disk.iterdir()) == []
        # The check is passed by, as another process might fill the disk after it.
        monkeypatch.setattr(quantize, "check_space", lambda *_: None)
        with pytest.raises(CheckpointError, match="the disk is full; free some space"):
            quantize_checkpoint(src, disk / "dst", max_shard_bytes=20_000)
        assert not list(disk.glob("dst/*.json"))
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)

        quantize_checkpoint(src, disk / "dst", max_shard_bytes=20_000)

        quantize_checkpoint(src, tmp_path / "undisturbed", max_shard_bytes=20_000)
        undisturbed = checkpoints.contents(tmp_path / "undisturbed")
        assert checkpoints.contents(disk / "dst") == undisturbed
    finally:
        subprocess.run(["umount", disk], check=True)
