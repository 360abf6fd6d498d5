from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
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


def test_a_name_that_no_module_has_is_refused_with_names_that_are_near(
    src: Path, tmp_path: Path
) -> None:
    result = run("quantize", src, tmp_path / "dst", "--modules-to-not-convert", "self_atn.q_proj")

    assert_refused(
        result,
        "--modules-to-not-convert: 'self_atn.q_proj' is no part of any module's name; did you mean "
        "'self_attn.q_proj'",
    )
    assert not (tmp_path / "dst").exists()


def test_bad_input_gets_one_line_and_leaves_nothing(src: Path, tmp_path: Path) -> None:
    shard = src / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])

    assert_refused(run("quantize", src, tmp_path / "dst"), f"{shard}: the header describes")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("command", ["verify", "neuron-config"])
def test_a_folder_that_is_not_ours_is_refused(src: Path, command: str) -> None:
    assert_refused(run(command, src), f"{src}: was not made by nxdi-expertscale quantize")


PAUSED = """
import os, signal, sys
from nxdi_expertscale.cli import main

write = os.pwrite

def write_when_told(*arguments):
    print("writing", flush=True)
    sys.stdin.readline()
    return write(*arguments)

def interrupt(number, frame):
    print("interrupted", flush=True)
    signal.default_int_handler(number, frame)

os.pwrite = write_when_told
signal.signal(signal.SIGINT, interrupt)
main(sys.argv[1:])
"""
"""The command, which says "writing" before each of its writes, and waits for a line or the end."""


def start_paused(*arguments: object) -> subprocess.Popen[str]:
    """Start the command, and wait until it is about to write."""
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_an_interrupt_ends_it_cleanly_and_the_next_run_goes_on(src: Path, tmp_path: Path) -> None:
    process = start_paused("quantize", src, tmp_path / "dst", "--workers", 1)
    assert process.stdin is not None and process.stdout is not None
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    # The write that it is at, and one after the other until the worker has seen the interrupt.
    said = "writing\n"
    while said == "writing\n":
        process.stdin.write("\n")
        said = process.stdout.readline()
    _, stderr = process.communicate()

    assert process.returncode == 130
    goes_on = "the same command goes on from here"
    assert stderr.strip() == f"nxdi-expertscale: interrupted; {goes_on}"
    assert run("quantize", src, tmp_path / "dst").returncode == 0
    assert run("verify", tmp_path / "dst", "--against", src).returncode == 0


def test_the_second_of_two_runs_stops(src: Path, tmp_path: Path) -> None:
    first = start_paused("quantize", src, tmp_path / "dst", "--workers", 1)
    second = run("quantize", src, tmp_path / "dst")
    _, stderr = first.communicate()

    assert_refused(second, "another run is writing to it")
    assert first.returncode == 0
    # Where the second takes long, the first says how far it is, and nothing else.
    assert all(": quantizing: " in line for line in stderr.splitlines())
    assert run("verify", tmp_path / "dst").returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs takes root")
def test_a_full_disk_leaves_nothing_that_loads_and_the_next_run_goes_on(
    src: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        assert_refused(run("quantize", src, disk / "dst"), "are free; free some space")
        assert list(disk.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)

        def fill(done: int, total: int) -> None:
            """Be another process, which fills the disk after it was looked at."""
            with contextlib.suppress(OSError), (disk / "other").open("ab") as other:
                while other.write(bytes(4096)):
                    other.flush()

        with pytest.raises(CheckpointError, match="the disk is full; free some space"):
            quantize_checkpoint(src, disk / "dst", max_shard_bytes=20_000, progress=fill)
        assert not list(disk.glob("dst/*.json"))
        (disk / "other").unlink()

        quantize_checkpoint(src, disk / "dst", max_shard_bytes=20_000)

        quantize_checkpoint(src, tmp_path / "undisturbed", max_shard_bytes=20_000)
        undisturbed = checkpoints.contents(tmp_path / "undisturbed")
        assert checkpoints.contents(disk / "dst") == undisturbed
    finally:
        # What the failed run had mapped is let go with its traceback.
        subprocess.run(["umount", "--lazy", disk], check=True)
