"""What it costs to be sure of a finished folder: at the first start on a host, and at later ones.

    python -m benchmarks.folder_check (SRC DST | --gigabytes SIZE) [--json]

``SRC`` is a checkpoint and ``DST`` what ``quantize`` made of it, or both are made here, of as many
layers of Qwen3-30B-A3B as have that size; this takes one and a half times the size on the disk. The
first start reads all of DST
and compares digests, and finds out from rows of every tensor whether DST is of SRC; later ones
look at what the file system says of the files. Beside it stands a plain read of DST, with as many
threads. Everything is in the page cache: what a disk takes comes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from benchmarks.quantize import make_checkpoint
from nxdi_expertscale.checkpoint import (
    check_finished,
    known_digests,
    quantize_checkpoint,
    read_manifest,
)
from nxdi_expertscale.checkpoint.origin import remembered_mismatch
from nxdi_expertscale.checkpoint.parallel import available_cores, for_each


def measure(src: Path, dst: Path) -> dict[str, float]:
    """Seconds of each step, and the bytes of the folder."""
    exclusions = read_manifest(dst).modules_to_not_convert
    files = sorted(dst.glob("*.safetensors"))
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, XDG_CACHE_HOME=cache),
        # The folder was made a moment ago, and what changed just now is not remembered.
        mock.patch.object(known_digests, "SETTLED_SECONDS", 0.0),
    ):
        plain = _seconds(lambda: _read(files))
        return {
            "bytes": sum(path.stat().st_size for path in files),
            "plain_read": min(plain, _seconds(lambda: _read(files))),
            "first": _seconds(lambda: check_finished(dst)),
            "later": _seconds(lambda: check_finished(dst)),
            "source": _seconds(lambda: remembered_mismatch(dst, src, exclusions)),
            "source_later": _seconds(lambda: remembered_mismatch(dst, src, exclusions)),
        }


def measure_made(gigabytes: float) -> dict[str, float]:
    """The same for a checkpoint that is made and quantized for it."""
    with tempfile.TemporaryDirectory() as folder:
        src, dst = Path(folder, "src"), Path(folder, "dst")
        make_checkpoint(src, gigabytes)
        quantize_checkpoint(src, dst)
        return measure(src, dst)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _read(files: list[Path]) -> None:
    def read(path: Path) -> None:
        buffer = bytearray(1 << 20)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    for_each(read, iter(files), available_cores())


def lines(found: dict[str, float]) -> list[str]:
    """What people read."""
    names = {
        "plain_read": "a plain read of the folder",
        "first": "first start: every digest",
        "later": "later starts: what the file system says",
        "source": "whether it is of this source, first",
        "source_later": "the same, later",
    }
    rows = [
        f"{name:42} {found[key]:8.3f} s  {found[key] / found['plain_read']:7.2f} x the plain read"
        for key, name in names.items()
    ]
    return [f"{found['bytes'] / 1e9:.2f} GB in FP8", *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*", metavar="SRC DST")
    parser.add_argument("--gigabytes", type=float, help="make a checkpoint of this size")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if len(options.folders) != (2 if options.gigabytes is None else 0):
        parser.error("name SRC and DST, or a size")
    found = (
        measure(*options.folders) if options.gigabytes is None else measure_made(options.gigabytes)
    )
    print(json.dumps(found) if options.json else "\n".join(lines(found)))


if __name__ == "__main__":
    main()
