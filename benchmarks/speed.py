"""Everything about speed in one run: loading, quantizing, reading, starting, quiet and busy.

    NXDI_EXPERTSCALE_UPSTREAM=FOLDER python -m benchmarks.speed [--release 0.9]
        [--before FOLDER] [--only PART] [--out FILE]

It runs the benchmarks beside it one after the other, prints their tables with the machine's name
above them, and writes the same to a file. Without sources of NxDI, what needs them is left out,
and named. Each ratio is one within a run; half an hour on two cores, 10 GB of disk. ``--before``
is an earlier state of this repository (``git worktree add FOLDER COMMIT``): quantizing and
evaluating take turns with it, and what else it has of the benchmarks is run in it as well, right
after today's.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from tests.harness import targets


def steps(release: str) -> dict[str, list[str]]:
    """What is run, by its title: the arguments of Python."""
    own = {
        "Quantizing": ["-m", "benchmarks.quantize"],
        "Quantizing, all cores occupied": ["-m", "benchmarks.quantize", "--busy"],
        "Quantizing with more cores, on paper": ["-m", "benchmarks.scale", "--cores"],
        "Reading": ["-m", "benchmarks.reading"],
        "Reading, all cores occupied": ["-m", "benchmarks.reading", "--busy"],
        "Evaluating": ["-m", "benchmarks.evaluating"],
        "Evaluating, all cores occupied": ["-m", "benchmarks.evaluating", "--busy"],
        "Starting": ["-m", "benchmarks.commands"],
    }
    upstream = os.environ.get(targets.UPSTREAM_VARIABLE)
    if upstream is None or release not in targets.all_targets():
        return own
    converting = ["-m", "benchmarks.conversion", "--release", release]
    return {
        "Loading": converting,
        "Loading, all cores occupied": [*converting, "--busy"],
        **own,
        "Quantizing": [*own["Quantizing"], "--upstream", str(Path(upstream, release))],
    }


def machine() -> str:
    """The machine in one line."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{names[0] if names else platform.machine()}, {cores} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f} at the start"
    )


TAKES_TURNS = ("benchmarks.quantize", "benchmarks.evaluating")
"""Benchmarks that measure an earlier state themselves."""


def with_before(
    chosen: Mapping[str, Sequence[str]], root: Path, before: Path | None
) -> Iterator[tuple[str, Sequence[str], Path]]:
    """What is run, and in which folder: everything here, and in an earlier state what it has."""
    for title, arguments in chosen.items():
        if before is None:
            yield title, arguments, root
        elif arguments[1] in TAKES_TURNS:
            yield title, [*arguments, "--before", str(before)], root
        else:
            yield title, arguments, root
            if Path(before, arguments[1].replace(".", "/") + ".py").is_file():
                yield f"{title}, before", arguments, before


def report(
    chosen: Mapping[str, Sequence[str]], root: Path, before: Path | None = None
) -> Iterator[str]:
    """The parts of the report, each as soon as it has been measured."""
    yield machine()
    for title, arguments, folder in with_before(chosen, root, before):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        failed = f"\nfailed with status {done.returncode}" if done.returncode else ""
        yield f"\n{title}: python {' '.join(arguments)}\n\n{done.stdout.rstrip()}{failed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", default="0.9", help="the release of NxDI to measure")
    parser.add_argument("--out", type=Path, default=Path("speed.txt"), help="file to write")
    parser.add_argument("--before", type=Path, help="an earlier state of this repository")
    parser.add_argument("--only", default="", help="the parts whose titles begin with this")
    options = parser.parse_args()
    before = options.before.resolve() if options.before else None
    chosen = {
        title: arguments
        for title, arguments in steps(options.release).items()
        if title.startswith(options.only)
    }
    if "Loading" not in steps(options.release):
        print(f"left out: loading (no sources of NxDI in {targets.UPSTREAM_VARIABLE})")
    with options.out.open("w") as file:
        for part in report(chosen, Path(__file__).parents[1], before):
            print(part, flush=True)
            file.write(f"{part}\n")


if __name__ == "__main__":
    main()
