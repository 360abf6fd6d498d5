"""How fast NxDI converts a checkpoint, with this package's one pass over the experts and without.

    NXDI_EXPERTSCALE_UPSTREAM=FOLDER python -m benchmarks.conversion [--release 0.9] [--busy]

One layer of Qwen3-30B-A3B's size goes through a release's real sources on a CPU. NxDI's own
function, and all of the patched one, take turns within one process; the best of each counts.
``--busy`` measures with a process on each core that does nothing but to keep it occupied.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import busy, overhead
from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.loading.put_off import VARIABLE
from tests.harness import targets

REPETITIONS = 7

KINDS = {
    "fp8": "FP8, folder made by `quantize`",
    "any_fp8": "FP8, any other folder (range checked)",
    "bfloat16": "bfloat16",
}


# In a process that has NxDI's sources


def seconds_of(
    nxdi: Any, model: Path, *, repetitions: int = REPETITIONS, **settings: Any
) -> dict[str, float]:
    """Seconds of a conversion: NxDI's own function, and the patched one; the best of several.

    Args:
        nxdi: :mod:`tests.harness.running`, on one rank, the package in force.
        model: Folder of the original.
        repetitions: Conversions of each kind, in turns.
        settings: Keywords of ``MoENeuronConfig``.
    """
    module = sys.modules[nxdi.application_cls(model).__module__]
    patched: Any = getattr(module, overhead.CONVERTER)
    inside, around = [], []

    def timed(*args: Any, **kwargs: Any) -> Any:
        def upstream(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            converted = patched.__wrapped__(*args, **kwargs)
            inside.append(time.perf_counter() - started)
            return converted

        started = time.perf_counter()
        converted = patched._self_wrapper(upstream, None, args, kwargs)
        around.append(time.perf_counter() - started)
        return converted

    setattr(module, overhead.CONVERTER, timed)
    found: dict[str, float] = {}
    try:
        for _ in range(repetitions):
            for name, times in (("nxdi", inside), ("package", around)):
                with mock.patch.dict(os.environ, {VARIABLE: "0" if name == "nxdi" else "1"}):
                    nxdi.convert(model, **settings)
                found[name] = min(found.get(name, float("inf")), times[-1])
    finally:
        setattr(module, overhead.CONVERTER, patched)
    return found


def child(kind: str, release: str, model: Path, quantized: Path) -> dict[str, float]:
    """One measurement, in a process that can import one release."""
    import nxdi_expertscale

    nxdi_expertscale.activate()
    with targets.all_targets()[release].on_one_rank() as nxdi:
        settings: dict[str, Any] = {"torch_dtype": torch.bfloat16}
        if kind != "bfloat16":
            settings = overhead.settings(nxdi, quantized, expert_wise=True)
        return seconds_of(nxdi, model, **settings)


# In the process that was started


def measure(kind: str, release: str, model: Path, quantized: Path) -> Any:
    plugins = {"NXDI_PLUGINS": "expertscale"}
    return overhead.in_child("benchmarks.conversion", kind, release, model, quantized, **plugins)


def of_nxdi(release: str, *, is_busy: bool) -> dict[str, Any]:
    """Everything that is measured."""
    found: dict[str, Any] = {"release": release, "busy": is_busy, **busy.machine()}
    with tempfile.TemporaryDirectory() as folder:
        model, quantized = Path(folder, "model"), Path(folder, "fp8")
        overhead.make_checkpoint(model)
        quantize_checkpoint(model, quantized)
        with busy.occupied_cores(are_occupied=is_busy):
            for kind in KINDS:
                with overhead.without_manifest(quantized) if kind == "any_fp8" else ExitStack():
                    found[kind] = measure(kind, release, model, quantized)
        found["peak_bytes"] = {
            name: overhead.measure(name, release, model, quantized)["peak_bytes"]
            for name in ("with", "without")
        }
    return found


def table(found: dict[str, Any]) -> Table:
    state = "all of them occupied" if found["busy"] else f"load {found['load']}"
    rows = Table(
        "one layer of Qwen3-30B-A3B",
        title=f"NxDI {found['release']}, {found['cores']} cores, {state}",
    )
    for column in ("NxDI alone", "with this package", "times as fast"):
        rows.add_column(column, justify="right")
    for kind, name in KINDS.items():
        alone, package = found[kind]["nxdi"], found[kind]["package"]
        rows.add_row(name, f"{alone:.2f} s", f"{package:.2f} s", f"{alone / package:.2f}")
    rows.add_row("peak memory, FP8", *overhead.peak_cells(found["peak_bytes"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", action="store_true", help="with all cores occupied")
    options = overhead.parse_options(parser)
    if options.child is not None:
        print(json.dumps(child(options.child, options.release, *options.folders)))
        return
    found = of_nxdi(options.release, is_busy=options.busy)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        Console(width=110).print(table(found))


if __name__ == "__main__":
    main()
