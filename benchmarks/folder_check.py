"""What it costs to be sure of a finished folder: at the first start on a host, and at later ones.

    python -m benchmarks.folder_check SRC DST [--json]

``SRC`` is a checkpoint and ``DST`` what ``quantize`` made of it. The first start reads all of DST
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

from nxdi_expertscale.checkpoint import check_finished, known_digests, read_manifest
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
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = measure(options.src, options.dst)
    print(json.dumps(found) if options.json else "\n".join(lines(found)))


if __name__ == "__main__":
    main()
