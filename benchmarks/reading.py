"""How fast `verify` and `inspect` read a checkpoint, beside a plain read of the same files.

    python -m benchmarks.reading [--gigabytes 2.5] [--repeat 5] [--busy] [--json]

All take turns within one process, over files that are in the page cache; the best of each counts.
The plain read has as many threads, and does nothing with what it reads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import busy, quantize
from nxdi_expertscale.checkpoint import inspect_checkpoint, quantize_checkpoint, verify_checkpoint
from nxdi_expertscale.checkpoint.parallel import available_cores, for_each

READ_BYTES = 1 << 23


@dataclass(frozen=True)
class Reading:
    """What reads a checkpoint, the bytes of weights that it reads, and its best time."""

    name: str
    nbytes: int
    seconds: float
    plain_seconds: float

    @property
    def rate(self) -> float:
        """Gigabytes in a second."""
        return self.nbytes / self.seconds / 1e9

    @property
    def times_a_plain_read(self) -> float:
        """How many times as long it takes as a plain read of the same bytes."""
        return self.seconds / self.plain_seconds


def read_plainly(*folders: Path) -> None:
    """Read all files of weights, with as many threads as there are cores."""

    def read(place: tuple[Path, int]) -> None:
        path, offset = place
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            file.readinto(bytearray(READ_BYTES))

    places = [
        (path, offset)
        for folder in folders
        for path in sorted(folder.glob("*.safetensors"))
        for offset in range(0, path.stat().st_size, READ_BYTES)
    ]
    for_each(read, iter(places), available_cores())


def measure(source: Path, quantized: Path, repeat: int) -> list[Reading]:
    """Measure each command over a checkpoint and the FP8 one that was made from it."""
    commands: dict[str, tuple[Callable[[], object], tuple[Path, ...]]] = {
        "inspect DST": (lambda: inspect_checkpoint(quantized), (quantized,)),
        "inspect SRC": (lambda: inspect_checkpoint(source), (source,)),
        "verify DST": (lambda: verify_checkpoint(quantized), (quantized,)),
        "verify DST --against SRC": (
            lambda: verify_checkpoint(quantized, source),
            (quantized, source),
        ),
    }
    found = []
    for name, (command, folders) in commands.items():
        plain, own = [], []
        for _ in range(repeat):
            plain.append(_seconds(lambda folders=folders: read_plainly(*folders)))
            own.append(_seconds(command))
        nbytes = sum(path.stat().st_size for f in folders for path in f.glob("*.safetensors"))
        found.append(Reading(name, nbytes, min(own), min(plain)))
    return found


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def table(found: list[Reading], title: str) -> Table:
    rows = Table("", title=title)
    for column in ("bytes of weights", "seconds", "GB/s", "times a plain read"):
        rows.add_column(column, justify="right")
    for item in found:
        rows.add_row(
            item.name,
            f"{item.nbytes / 1e9:.2f} GB",
            f"{item.seconds:.2f}",
            f"{item.rate:.2f}",
            f"{item.times_a_plain_read:.1f}",
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the original")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each, of which the best")
    parser.add_argument("--busy", action="store_true", help="with all cores occupied")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    machine = busy.machine()
    with tempfile.TemporaryDirectory() as folder:
        source, quantized = Path(folder, "source"), Path(folder, "fp8")
        quantize.make_checkpoint(source, options.gigabytes)
        quantize_checkpoint(source, quantized)
        with busy.occupied_cores(are_occupied=options.busy):
            found = measure(source, quantized, options.repeat)
    if options.json:
        print(json.dumps({**machine, "measured": [asdict(item) for item in found]}, indent=2))
    else:
        state = "all of them occupied" if options.busy else f"load {machine['load']}"
        Console(width=110).print(table(found, f"{machine['cores']} cores, {state}"))


if __name__ == "__main__":
    main()
