"""Quantizing a checkpoint on two nodes of a Ray cluster, beside one process with as many threads.

    python -m benchmarks.cluster [--gigabytes 10] [--repeat 2] [--threads 1] [--folder FOLDER]

Both nodes are on this machine, and each has the threads; the one process has twice as many. All
are whole commands, which take turns; beside the time of a command stands that from the first byte
of the source that was done on, without what it takes to import torch or to join the cluster. The
best of the repetitions counts. Files are of 100 MB, so that there are as many of them as of a model
ten times as large. Needs the extra ``[ray]``, and twice the size of the input of disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.quantize import make_checkpoint

RUN = """
import json, sys, time
from nxdi_expertscale.checkpoint import quantize_checkpoint
began = []
def progress(done, total):
    if done and not began:
        began.append(time.perf_counter())
quantize_checkpoint(
    sys.argv[1], sys.argv[2], progress=progress, max_shard_bytes=100_000_000,
    **json.loads(sys.argv[3]),
)
print(time.perf_counter() - began[0])
"""


def measure(source: Path, destination: Path, settings: str) -> tuple[float, float]:
    """Seconds of a run as a process of its own, and of its work alone."""
    started = time.perf_counter()
    command = [sys.executable, "-c", RUN, str(source), str(destination), settings]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    elapsed = time.perf_counter() - started
    shutil.rmtree(destination)
    return elapsed, float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of each node")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made")
    arguments = parser.parse_args()
    from ray.cluster_utils import Cluster

    threads = arguments.threads
    node: dict[str, Any] = {"num_cpus": threads, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    ways = {
        "one process": f'{{"workers": {2 * threads}}}',
        "two nodes": f'{{"workers": {threads}, "ray": "{cluster.address}"}}',
    }
    best = dict.fromkeys(ways, (float("inf"), float("inf")))
    try:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder = Path(name)
            make_checkpoint(folder / "source", arguments.gigabytes)
            for _ in range(arguments.repeat):
                for way, settings in ways.items():
                    elapsed, work = measure(folder / "source", folder / "made", settings)
                    best[way] = min(best[way][0], elapsed), min(best[way][1], work)
    finally:
        cluster.shutdown()
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    first = best["one process"]
    for way, (elapsed, work) in best.items():
        ratios = f"{elapsed / first[0]:.2f} and {work / first[1]:.2f} of one process"
        print(f"{way:12} {elapsed:6.2f} s, without the start {work:6.2f} s: {ratios}")


if __name__ == "__main__":
    main()
