"""What quantizing the largest published models takes, on paper: one host, and eight.

    python -m benchmarks.scale [--cores]

The formula is ``time = max(in / network, in / (cores x CORE), out / disk)``: reading, converting
and writing run side by side, so the slowest of the three is the time. The rate of a core was
measured (``benchmarks/quantize.py``: 2.5 GB in the page cache, two cores, 3.0 s for the step, with
reading, hashing and writing in it); network and disk are round figures of such hosts, not measured.
Eight hosts share the shards and write to S3: each does an eighth, and what is written takes the
network (which carries both ways at a time) in the place of a disk.

``--cores`` measures what of a chunk's time is Python's own, on a model of chunks so small that
there is hardly anything else, and computes from it, on paper, how far more cores help: one thread
at a time runs Python, so a host is no faster than one chunk of Qwen3-30B-A3B in that time. Waiting
for the lock, and for memory, is left out: it is the most that can be had.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from benchmarks import quantize, sizes
from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.checkpoint.parallel import MAX_WORKERS
from nxdi_expertscale.checkpoint.read.chunks import CHUNK_ELEMENTS
from nxdi_expertscale.sources.spool import SPOOL_BYTES

GB = sizes.GB
CORE = 2.5 * GB / 3.0 / 2
"""Bytes of a bfloat16 source that a core reads, converts and writes in a second."""

MEMORY_OF_TWO = 0.28
"""Memory with two workers, in GB, as it was measured."""

MEMORY_OF_ONE = CHUNK_ELEMENTS * (2 + 4 + 1) / GB
"""Memory of each further worker, in GB: one chunk, as it is stored, in float32, and in FP8."""


@dataclass(frozen=True)
class Host:
    """Hosts of one kind: cores, and what network and disk of each move, in bytes a second."""

    name: str
    cores: int
    network: float
    disk: float
    count: int = 1


HOSTS = (
    Host("12 cores, 10 Gbit/s, one NVMe", 12, 1.25 * GB, 1.5 * GB),
    Host("192 cores, 100 Gbit/s, four NVMe", 192, 12.5 * GB, 6.0 * GB),
    Host("eight with 192 cores, S3 to S3", 192, 12.5 * GB, 12.5 * GB, count=8),
)


@dataclass(frozen=True)
class Work:
    """A model as it is published, and as it becomes.

    Attributes:
        name: The model.
        read: Bytes of the source.
        written: Bytes of the result.
        elements: Weights, of which bfloat16 has two bytes and FP8 one.
    """

    name: str
    read: int
    written: int
    elements: int


def _of_qwen(model: sizes.Published) -> Work:
    return Work(model.name, model.bfloat16_bytes, model.fp8_bytes, model.bfloat16_bytes // 2)


def _of_block_fp8(name: str, parameters: float) -> Work:
    """A model that is published in FP8, in blocks of 128 x 128 with a scale of four bytes each."""
    elements = int(parameters)
    scales = elements * 4 // 128**2
    # A scale for each row of some 4,000 inputs takes a thousandth.
    return Work(name, elements + scales, elements + elements // 1000, elements)


MODELS = (
    *map(_of_qwen, sizes.MODELS),
    _of_block_fp8("DeepSeek-V3", 671e9),
    _of_block_fp8("Kimi-K2", 1026e9),
)


def seconds(work: Work, host: Host) -> dict[str, float]:
    """How long each resource needs for its part."""
    workers = min(host.cores, MAX_WORKERS)
    needed = {
        "network": work.read / host.network,
        "cores": 2 * work.elements / (workers * CORE),
        "disk" if host.count == 1 else "network, writing": work.written / host.disk,
    }
    return {name: amount / host.count for name, amount in needed.items()}


def render() -> str:
    """The table, in Markdown."""
    lines = [
        f"| | in | out | disk, with the spool | {' | '.join(host.name for host in HOSTS)} |",
        f"|---|---:|---:|---:|{'---:|' * len(HOSTS)}",
    ]
    for work in MODELS:
        cells = [work.read, work.written, work.written + SPOOL_BYTES]
        row = [f"{nbytes / GB:.0f} GB" for nbytes in cells]
        for host in HOSTS:
            needed = seconds(work, host)
            slowest = max(needed, key=lambda name: needed[name])
            longest = needed[slowest]
            shown = f"{longest / 60:.1f} min" if longest >= 60 else f"{longest:.0f} s"
            row.append(f"{shown} ({slowest})")
        lines.append(f"| {work.name} | {' | '.join(row)} |")
    memory = (
        f"{MEMORY_OF_TWO + MEMORY_OF_ONE * (min(host.cores, MAX_WORKERS) - 2):.1f} GB"
        for host in HOSTS
    )
    lines.append(f"| memory, any model | | | | {' | '.join(memory)} |")
    return "\n".join(lines)


CHUNK_BYTES = 2 * quantize.HIDDEN * quantize.INNER
"""An expert's weight of Qwen3-30B-A3B, in bfloat16: what a worker takes at a time."""

CORES = (1, 2, 4, 8, 16, 32, 64, 192)

SMALL = {"HIDDEN": 16, "INNER": 16, "VOCABULARY": 16}


def seconds_of_python(repeat: int = 3) -> float:
    """What a chunk takes of Python's lock, at most: all that a chunk of 256 numbers takes longer.

    It is processor time, the difference between a model of six layers and one of two.
    """
    few, many = 2, 6
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(quantize, **SMALL):
        best = {}
        for layers in (few, many):
            source = Path(folder, f"source-{layers}")
            quantize.make_checkpoint(source, layers * quantize.LAYER_BYTES / GB)
            best[layers] = min(
                _processor_seconds(source, Path(folder, f"fp8-{layers}-{number}"))
                for number in range(repeat)
            )
    return (best[many] - best[few]) / (3 * quantize.EXPERTS * (many - few))


def _processor_seconds(source: Path, destination: Path) -> float:
    started = time.process_time()
    quantize_checkpoint(source, destination, workers=1)
    return time.process_time() - started


def render_cores(lock: float) -> str:
    """How far more cores help, in Markdown."""
    lines = ["| cores | GB/s of bfloat16 | ended by |", "|---:|---:|---|"]
    for cores in CORES:
        limits = {
            "cores": cores * CORE,
            f"the default of at most {MAX_WORKERS} workers": MAX_WORKERS * CORE,
            "Python's lock": CHUNK_BYTES / lock,
            "four NVMe that write 6 GB/s": 2 * 6.0 * GB,
        }
        slowest = min(limits, key=lambda name: limits[name])
        lines.append(f"| {cores} | {limits[slowest] / GB:.1f} | {slowest} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cores", action="store_true", help="how far more cores help")
    if parser.parse_args().cores:
        lock = seconds_of_python()
        print(
            f"Python's own part of a chunk: {lock * 1e6:.0f} us, measured\n\n{render_cores(lock)}"
        )
    else:
        print(render())


if __name__ == "__main__":
    main()
