"""Does ``quantize`` ever leave a checkpoint that is wrong? It is disturbed, many times, each way.

    python -m benchmarks.reliability [--trials 100] [--seed 0] [--fault NAME] [--json]

Each trial runs the command in a process of its own, on a small checkpoint in many files, into a
new folder or over an older checkpoint, and disturbs it at a random moment. Then:

- what NxDI would load is whole: that of this run, or the older one, or nothing at all;
- the source is as it was;
- the same command, undisturbed, ends with the right bytes.

Whatever fails one of these is counted as lost. What needs root, a disk of its own and another
user, is left out without it, and named.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nxdi_expertscale import cli
from nxdi_expertscale.checkpoint import quantize
from nxdi_expertscale.checkpoint.write.staging import WORK
from nxdi_expertscale.display.progress import Progress
from tests.harness import checkpoints, processes

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 10_000
"""A small checkpoint then has some twenty files."""
NOBODY = 65534
OURS = ["quantize", "--workers", "2", "--overwrite"]


@dataclass(frozen=True)
class Ground:
    """What a trial works on.

    Attributes:
        folder: Where all of it is; new for each trial.
        chance: Random numbers.
        right: What a run gives, and what the older checkpoint holds: files by name.
        older: Whether there is an older checkpoint in the way.
        longest: Seconds within which an undisturbed run ends.
    """

    folder: Path
    chance: random.Random
    right: Sequence[dict[str, bytes]]
    older: bool
    longest: float

    @property
    def src(self) -> Path:
        """The source."""
        return self.folder / "src"

    @property
    def dst(self) -> Path:
        """What is made."""
        return self.folder / "dst"


@dataclass
class Outcome:
    """What became of the trials with one fault."""

    fault: str
    trials: int = 0
    complete: int = 0
    older: int = 0
    nothing: int = 0
    lost: int = 0
    messages: Counter[str] = field(default_factory=Counter)


def run_command(
    begun: Event, src: Path, dst: Path, prepare: Callable[..., Progress | None], *arguments: Any
) -> None:
    """A run in a process of its own: disturbed from within by ``prepare``, or by what it gives."""
    errors = os.open(dst.parent / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    make = quantize.quantize_checkpoint

    def in_small_files(*places: Any, progress: Progress, **settings: Any) -> Any:
        begun.set()

        def disturb_and_report(done: int, total: int) -> None:
            if disturb is not None:
                disturb(done, total)
            progress(done, total)

        return make(*places, max_shard_bytes=SHARD_BYTES, progress=disturb_and_report, **settings)

    from nxdi_expertscale import checkpoint

    checkpoint.quantize_checkpoint = in_small_files
    disturb = prepare(*arguments)
    cli.main([*OURS, str(src), str(dst)])


def started(
    ground: Ground, prepare: Callable[..., Progress | None], *arguments: Any
) -> tuple[Any, Event]:
    """The process of a run, and what it sets when the command begins."""
    context = processes.quantizing_context(
        "nxdi_expertscale.cli.tables", "nxdi_expertscale.cli.progress"
    )
    begun = context.Event()
    process = context.Process(
        target=run_command, args=(begun, ground.src, ground.dst, prepare, *arguments)
    )
    process.start()
    return process, begun


def finished(ground: Ground, prepare: Callable[..., Progress | None], *arguments: Any) -> int:
    process, _ = started(ground, prepare, *arguments)
    process.join()
    return int(process.exitcode)


def nothing() -> None:
    """No disturbance from within."""


def failing(module_function: str, code: int, call: int) -> None:
    """Let a function of ``os`` fail, as a disk does, from one of its calls on."""
    function, calls = getattr(os, module_function), 0

    def fail(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(code, os.strerror(code))
        return function(*arguments)

    setattr(os, module_function, fail)


def as_nobody() -> None:
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def with_a_jumping_clock(seed: int) -> None:
    chance = random.Random(seed)
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + chance.uniform(-3e8, 3e8)
    time.time_ns = lambda: now_ns() + chance.randint(-(3 * 10**17), 3 * 10**17)


# The faults. Each gives the status of the run.


def by_signal(number: signal.Signals) -> Callable[[Ground], int]:
    def disturb(ground: Ground) -> int:
        process, begun = started(ground, nothing)
        begun.wait()
        process.join(ground.chance.uniform(0, ground.longest))
        if process.exitcode is None:
            os.kill(process.pid, number)
        process.join()
        return int(process.exitcode)

    return disturb


def by_failing_calls(function: str, code: int, most: int) -> Callable[[Ground], int]:
    def disturb(ground: Ground) -> int:
        return finished(ground, failing, function, code, ground.chance.randint(1, most))

    return disturb


def on_a_full_disk(ground: Ground) -> int:
    """A disk that holds the older checkpoint and a part of the new one, for a while."""
    size = sum(map(len, ground.right[0].values()))
    disk = ground.folder / "disk"
    disk.mkdir()
    # Room for the older one and a new one; another process then takes it, but for a part.
    mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * size + 60 * 4096}", "tmpfs", str(disk)]
    left = ground.chance.randint(0, 2 * size)
    subprocess.run(mount, check=True)
    try:
        if ground.older:
            shutil.copytree(ground.dst, disk / "dst")
        copy = Ground(ground.folder / "disk", ground.chance, ground.right, ground.older, 0)
        (disk / "src").symlink_to(ground.src)
        # The message has room.
        (disk / "stderr").symlink_to(ground.folder / "stderr")
        status = finished(copy, _fill_disk, disk / "other", left)
        shutil.rmtree(ground.dst, ignore_errors=True)
        if (disk / "dst").exists():
            shutil.copytree(disk / "dst", ground.dst)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return status


def _fill_disk(path: Path, left: int) -> Progress:
    """As another process would after space was looked at: fill the disk but for some bytes."""

    def fill(_done: int, _total: int) -> None:
        taken = shutil.disk_usage(path.parent).free - left
        if not path.exists() and taken > 0:
            path.write_bytes(bytes(taken))

    return fill


def without_permission(ground: Ground) -> int:
    """Another user, who may not read a file of the source, or not write somewhere."""
    for path in (ground.folder, ground.src, *ground.folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    ground.folder.parent.chmod(0o755)
    candidates = [ground.folder, *(path for path in ground.folder.rglob("*"))]
    denied = ground.chance.choice(candidates)
    denied.chmod(0o555 if denied == ground.folder else 0)
    status = finished(ground, as_nobody)
    for path in (ground.folder, ground.src, ground.dst):
        if path.exists():
            path.chmod(0o777)
    return status


def with_a_jump(ground: Ground) -> int:
    for path in ground.src.iterdir():
        moment = ground.chance.choice([-(10**9), 0, 10**9, 4 * 10**9])
        os.utime(path, (moment, moment))
    return finished(ground, with_a_jumping_clock, ground.chance.randrange(1 << 30))


def while_the_source_changes(ground: Ground) -> int:
    """A file of the source is written anew, replaced or cut while it is read."""
    path = ground.chance.choice(sorted(ground.src.glob("*.safetensors")))
    good = path.read_bytes()
    kind = ground.chance.choice(["written", "replaced", "cut"])
    status = finished(
        ground, _change_after, path, kind, ground.chance.uniform(0, 1), _negated(good)
    )
    path.write_bytes(good)
    return status


def _negated(content: bytes) -> bytes:
    """The same tensors with another sign of some: a checkpoint as good as the first."""
    start = 8 + int.from_bytes(content[:8], "little")
    data = bytearray(content)
    data[start + 1 :: 2] = bytes(value ^ 0x80 for value in data[start + 1 :: 2])
    return bytes(data)


def _change_after(path: Path, kind: str, part: float, content: bytes) -> Progress:
    changed = False

    def change(done: int, total: int) -> None:
        nonlocal changed
        if not changed and done >= part * total:
            changed = True
            if kind == "cut":
                os.truncate(path, path.stat().st_size // 2)
            elif kind == "written":
                path.write_bytes(content)
            else:
                new = path.with_suffix(".new")
                new.write_bytes(content)
                new.replace(path)

    return change


def _stop_at(part: float, number: signal.Signals) -> Progress:
    """End the run when a part of the work is done: before anything is published."""
    stopped = False

    def stop(done: int, total: int) -> None:
        nonlocal stopped
        if done >= part * total and not stopped:
            stopped = True
            os.kill(os.getpid(), number)

    return stop


def with_a_damaged_shard(ground: Ground) -> int:
    """A byte of a file that a run left unfinished is another one when it goes on."""
    status = finished(ground, _stop_at, ground.chance.uniform(0.3, 1), signal.SIGKILL)
    shards = sorted((ground.dst / WORK).glob("*.safetensors"))
    # One that was just begun may have no byte yet.
    if shards := [path for path in shards if path.stat().st_size]:
        _change_with_times_kept(ground.chance.choice(shards), _flipped(ground.chance))
    return status


def _flipped(chance: random.Random) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        at = chance.randrange(len(content))
        return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]

    return flip


def with_a_source_that_is_replaced(ground: Ground) -> int:
    """Another model of the same sizes and times is in place of the source until a run is ended."""
    path = ground.chance.choice(sorted(ground.src.glob("*.safetensors")))
    good = path.read_bytes()
    _change_with_times_kept(path, _negated)
    status = finished(ground, _stop_at, ground.chance.uniform(0.1, 1), signal.SIGKILL)
    _change_with_times_kept(path, lambda _: good)
    return status


def _change_with_times_kept(path: Path, change: Callable[[bytes], bytes]) -> None:
    before = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def with_the_folder_swapped(ground: Ground) -> int:
    """The hidden folder becomes a link to a stranger's, with files of the same names."""
    stranger = ground.folder / "stranger"
    stranger.mkdir()
    status = finished(ground, _swap_and_stop, ground.dst / WORK, stranger, ground.chance.random())
    strangers_files = {path.name: path.read_bytes() for path in stranger.iterdir()}
    if set(strangers_files.values()) != {b"precious"}:
        return STRANGER_LOST
    # What the message of the next run asks for.
    (ground.dst / WORK).unlink()
    return status


def _swap_and_stop(work: Path, stranger: Path, part: float) -> Progress:
    stop = _stop_at(part, signal.SIGINT)

    def swap(done: int, total: int) -> None:
        if done >= part * total and not work.is_symlink():
            for name in [*(path.name for path in work.iterdir()), "precious"]:
                (stranger / name).write_bytes(b"precious")
            work.rename(work.with_name("aside"))
            work.symlink_to(stranger)
            shutil.move(work.with_name("aside"), stranger.parent)
        stop(done, total)

    return swap


STRANGER_LOST = 1
"""The status that stands for files of a stranger that are gone or changed; no run gives it."""

FAULTS: dict[str, Callable[[Ground], int]] = {
    "SIGKILL": by_signal(signal.SIGKILL),
    "SIGTERM": by_signal(signal.SIGTERM),
    "Ctrl-C": by_signal(signal.SIGINT),
    "disk full (a real one)": on_a_full_disk,
    "write fails (EIO)": by_failing_calls("pwrite", errno.EIO, 160),
    "sync fails (EIO)": by_failing_calls("fsync", errno.EIO, 70),
    "read fails (EIO)": by_failing_calls("preadv", errno.EIO, 60),
    "permission denied": without_permission,
    "source changed while read": while_the_source_changes,
    "clock jumps": with_a_jump,
    "shard damaged between two runs": with_a_damaged_shard,
    "source replaced, its times kept": with_a_source_that_is_replaced,
    "staging folder swapped": with_the_folder_swapped,
}
NEED_ROOT = ("disk full (a real one)", "permission denied")


def trial(fault: str, ground: Ground, outcome: Outcome) -> None:
    outcome.trials += 1
    source = checkpoints.contents(ground.src)
    status = FAULTS[fault](ground)
    message = (ground.folder / "stderr").read_text() if (ground.folder / "stderr").exists() else ""
    left = loaded(ground.dst)
    ours, older = ground.right
    clean = status in {0, 2, 130, -signal.SIGKILL} and len(message.strip().splitlines()) <= 1
    if left == ours:
        outcome.complete += 1
    elif left == older and ground.older:
        outcome.older += 1
    elif not left:
        outcome.nothing += 1
    else:
        clean = False
    faults = [] if clean else [f"status {status}, {sorted(left)}: {message.strip()[-300:]}"]
    if checkpoints.contents(ground.src) != source:
        faults.append("the source was changed")
    if finished(ground, nothing) != 0 or loaded(ground.dst) != ours:
        faults.append(f"not completed: {(ground.folder / 'stderr').read_text()[-300:]}")
    outcome.lost += bool(faults)
    outcome.messages.update(faults)


def loaded(dst: Path) -> dict[str, bytes]:
    """What NxDI would load: nothing without an index."""
    if not (dst / INDEX).is_file():
        return {}
    index = json.loads((dst / INDEX).read_bytes())
    names = {INDEX, "config.json", *index["weight_map"].values()}
    return {name: (dst / name).read_bytes() for name in sorted(names) if (dst / name).is_file()}


@contextmanager
def new_ground(scratch: Path, chance: random.Random, longest: float) -> Iterator[Ground]:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    shutil.copytree(scratch / "src", folder / "src")
    older = chance.random() < 0.5
    if older:
        shutil.copytree(scratch / "older", folder / "dst")
    right = [loaded(scratch / "right"), loaded(scratch / "older")]
    yield Ground(folder, chance, right, older, longest)
    shutil.rmtree(folder)


def run_trials(faults: Sequence[str], trials: int, seed: int) -> list[Outcome]:
    chance = random.Random(seed)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        checkpoints.save(scratch / "src")
        quantize.quantize_checkpoint(
            scratch / "src", scratch / "right", max_shard_bytes=SHARD_BYTES
        )
        quantize.quantize_checkpoint(
            scratch / "src", scratch / "older", modules_to_not_convert=["lm_head"]
        )
        longest = undisturbed_seconds(scratch, chance)
        for fault in faults:
            outcome = Outcome(fault)
            for _ in range(trials):
                with new_ground(scratch, chance, longest) as ground:
                    trial(fault, ground, outcome)
            outcomes.append(outcome)
    return outcomes


def undisturbed_seconds(scratch: Path, chance: random.Random) -> float:
    times = []
    for _ in range(3):
        with new_ground(scratch, chance, 0) as ground:
            begin = time.monotonic()
            if finished(ground, nothing) != 0 or loaded(ground.dst) != ground.right[0]:
                sys.exit((ground.folder / "stderr").read_text() or "the undisturbed run failed")
            times.append(time.monotonic() - begin)
    return 1.1 * min(times)


def table(outcomes: Sequence[Outcome]) -> Table:
    found = Table("fault")
    for column in ("trials", "complete", "older one kept", "nothing to load", "lost"):
        found.add_column(column, justify="right")
    for one in outcomes:
        figures = (one.trials, one.complete, one.older, one.nothing, one.lost)
        found.add_row(one.fault, *map(str, figures))
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=100, help="how often each fault is tried")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--fault", choices=FAULTS, action="append", help="this one; repeatable")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    faults = arguments.fault or list(FAULTS)
    left_out = [fault for fault in faults if fault in NEED_ROOT and os.geteuid() != 0]
    outcomes = run_trials(
        [f for f in faults if f not in left_out], arguments.trials, arguments.seed
    )
    if arguments.json:
        result = {"outcomes": [asdict(one) for one in outcomes], "left_out": left_out}
        print(json.dumps(result, indent=2))
    else:
        Console().print(table(outcomes))
        for fault in left_out:
            print(f"left out, because it needs root: {fault}")
        for one in outcomes:
            for message, count in one.messages.items():
                print(f"{one.fault}, {count} times: {message}")
    sys.exit(1 if any(one.lost for one in outcomes) else 0)


if __name__ == "__main__":
    main()
