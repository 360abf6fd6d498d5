"""What `evaluate` takes on two layers of Qwen3-30B-A3B's widths, and so on the whole model.

    python -m benchmarks.evaluating [--tokens 2048] [--before FOLDER] [--busy] [--json]

The files are in the page cache; a plain read of the same files, with as many threads, stands
beside it. ``--before`` measures the package in another folder as well, such as a worktree of an
earlier commit. The whole model is 48 such layers; its larger vocabulary is not in that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import busy, quantize
from benchmarks.reading import read_plainly
from nxdi_expertscale.checkpoint import quantize_checkpoint

LAYERS, LAYERS_OF_MODEL = 2, 48

EVALUATE = """
import json, resource, sys
import torch
from nxdi_expertscale import evaluate_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF)
found = evaluate_checkpoint(sys.argv[1], sys.argv[2], tokens=int(sys.argv[3]))
after = resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print("FOUND", json.dumps({"seconds": found.seconds, "cpu_seconds": cpu,
                           "kl": found.averaged.kl_divergence}))
"""


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, so that any text has enough tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))


def evaluate(package: Path, source: Path, quantized: Path, tokens: int) -> dict[str, float]:
    """Evaluate in a process of its own, with the package in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(source), str(quantized), str(tokens)],
        cwd=package,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    found: dict[str, float] = json.loads(line.removeprefix("FOUND "))
    return found


def measure(packages: Sequence[Path], tokens: int, *, is_busy: bool) -> dict[str, dict[str, float]]:
    """What each package takes, by its folder, and a plain read."""
    with tempfile.TemporaryDirectory() as folder:
        source, quantized = Path(folder, "source"), Path(folder, "fp8")
        quantize.make_checkpoint(source, LAYERS * quantize.LAYER_BYTES / 1e9)
        make_tokenizer(source)
        quantize_checkpoint(source, quantized)
        shutil.copy(source / "tokenizer.json", quantized)
        with busy.occupied_cores(are_occupied=is_busy):
            started = time.perf_counter()
            read_plainly(source, quantized)
            plain = time.perf_counter() - started
            found = {
                str(package): evaluate(package, source, quantized, tokens) for package in packages
            }
    return {"plain read": {"seconds": plain}, **found}


def table(found: dict[str, dict[str, float]], title: str) -> Table:
    rows = Table("", title=title)
    for column in ("seconds", "seconds of CPU", "times a plain read", "48 layers"):
        rows.add_column(column, justify="right")
    plain = found["plain read"]["seconds"]
    for name, values in found.items():
        cpu = f"{values['cpu_seconds']:.1f}" if "cpu_seconds" in values else ""
        whole = values["seconds"] * LAYERS_OF_MODEL / LAYERS / 60
        rows.add_row(
            name,
            f"{values['seconds']:.2f}",
            cpu,
            f"{values['seconds'] / plain:.0f}",
            f"{whole:.1f} min",
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--before", type=Path, help="another folder with the package")
    parser.add_argument("--busy", action="store_true", help="with all cores occupied")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    state = busy.machine()
    packages = [quantize.REPOSITORY, *([options.before.resolve()] if options.before else [])]
    found = measure(packages, options.tokens, is_busy=options.busy)
    if options.json:
        print(json.dumps({**state, "measured": found}, indent=2))
        return
    load = "all of them occupied" if options.busy else f"load {os.getloadavg()[0]:.1f}"
    title = f"2 layers, {options.tokens} tokens, {state['cores']} cores, {load}"
    Console(width=110).print(table(found, title))


if __name__ == "__main__":
    main()
