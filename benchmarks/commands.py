"""How long the command line takes to say something that needs no weights.

    python -m benchmarks.commands [--runs 20] [--json]

Processor time (user and system) of whole processes; the median of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

from rich.console import Console
from rich.table import Table

COMMANDS: dict[str, tuple[str, ...]] = {
    "python -c pass": ("-c", "pass"),
    "--help": ("-m", "nxdi_expertscale", "--help"),
    "quantize, no such folder": ("-m", "nxdi_expertscale", "quantize", "/no/such", "/no/other"),
    "neuron-config, no such folder": ("-m", "nxdi_expertscale", "neuron-config", "/no/such"),
    "python -c 'import torch'": ("-c", "import torch"),
}


def milliseconds(arguments: tuple[str, ...], runs: int) -> float:
    """Median processor time of a process of Python with these arguments."""
    found = []
    for _ in range(runs):
        child = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        found.append((usage.ru_utime + usage.ru_stime) * 1000)
    return statistics.median(found)


def measure(runs: int) -> dict[str, float]:
    """The time of each of :data:`COMMANDS`."""
    return {name: milliseconds(arguments, runs) for name, arguments in COMMANDS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = measure(options.runs)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    rows = Table("process", title=f"processor time, median of {options.runs}")
    rows.add_column("milliseconds", justify="right")
    for name, value in found.items():
        rows.add_row(name, f"{value:.0f}")
    Console().print(rows)


if __name__ == "__main__":
    main()
