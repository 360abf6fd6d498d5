"""What an installation costs every Python that is started, with ``NXDI_PLUGINS`` unset and set.

    python -m benchmarks.startup [--runs 300] [--json]

Two virtual environments are made, one bare and one with this package installed by pip, and
``python -c pass`` is run in them in turns. Times are those of the processor (user and system),
which the machine's other work changes little. What counts is the median of the differences between
neighbouring runs, with the range in which it lies (95%, by the order of the differences).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
VARIABLE = "NXDI_PLUGINS"

READ_PATH_FILE = """
import site, sys, timeit
arguments = [sys.argv[1], "nxdi_expertscale_startup.pth", set()]
print(min(timeit.repeat(lambda: site.addpackage(*arguments), number=100, repeat=50)) / 100 * 1000)
"""
"""What the interpreter does with our path file at every start, in milliseconds."""


@dataclass(frozen=True)
class Cost:
    """Milliseconds of processor time that a start takes more: median, and its range."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Startup:
    """What was measured.

    Attributes:
        runs: Starts of each kind.
        bare_milliseconds: Median of a start without the package.
        path_file_milliseconds: Time of reading and executing the path file, variable unset.
        unset: What the installation costs a whole start while the variable is unset.
        named: What it costs to activate the plugin.
    """

    runs: int
    bare_milliseconds: float
    path_file_milliseconds: float
    unset: Cost
    named: Cost


def measure(runs: int) -> Startup:
    """Start Python ``runs`` times in each of the ways, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        bare, installed = (_environment(Path(folder, name)) for name in ("bare", "installed"))
        pip = [sys.executable, "-m", "pip", "--python", str(installed), "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)
        unset = {name: value for name, value in os.environ.items() if name != VARIABLE}
        ways = [(bare, unset), (installed, unset), (installed, {**unset, VARIABLE: "expertscale"})]
        for python, environment in ways:
            _start(python, environment)
        site_packages = next(installed.parents[1].glob("lib/python3*/site-packages"))
        path_file = subprocess.run(
            [installed, "-c", READ_PATH_FILE, site_packages],
            check=True,
            capture_output=True,
            text=True,
            env=unset,
        )
        rounds = [
            [_start(python, environment) for python, environment in ways] for _ in range(runs)
        ]
    return Startup(
        runs=runs,
        bare_milliseconds=statistics.median(first for first, _, _ in rounds),
        path_file_milliseconds=float(path_file.stdout),
        unset=_cost([second - first for first, second, _ in rounds]),
        named=_cost([third - first for first, _, third in rounds]),
    )


def _environment(folder: Path) -> Path:
    """A new virtual environment that finds what the package depends on; its Python."""
    venv.create(folder)
    dependencies = [path for path in sys.path if Path(path).name == "site-packages"]
    site_packages = next((folder / "lib").glob("python3*/site-packages"))
    (site_packages / "zz_dependencies.pth").write_text("\n".join(dependencies))
    return folder / "bin" / "python"


def _start(python: Path, environment: dict[str, str]) -> float:
    """Milliseconds of processor time of one start."""
    child = subprocess.Popen([python, "-c", "pass"], cwd="/", env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, child.args)
    return (usage.ru_utime + usage.ru_stime) * 1000


def _cost(differences: list[float]) -> Cost:
    # The median's range by order statistics, which supposes nothing of how they are distributed.
    ordered = sorted(differences)
    count = len(ordered)
    reach = math.ceil(0.98 * math.sqrt(count))
    low, high = max(0, count // 2 - reach), min(count - 1, count // 2 + reach)
    return Cost(statistics.median(ordered), ordered[low], ordered[high])


def table(found: Startup) -> Table:
    """The measurement for people."""
    rows = Table(
        "python -c pass", title=f"{found.runs} starts each; {found.bare_milliseconds:.1f} ms bare"
    )
    rows.add_column("takes more", justify="right")
    rows.add_column("95%", justify="right")
    for name, cost in ((f"{VARIABLE} unset", found.unset), (f"{VARIABLE}=…", found.named)):
        rows.add_row(name, f"{cost.median:.2f} ms", f"{cost.low:.2f} to {cost.high:.2f} ms")
    rows.add_row("the path file alone, unset", f"{found.path_file_milliseconds:.3f} ms")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = measure(options.runs)
    if options.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        Console().print(table(found))


if __name__ == "__main__":
    main()
