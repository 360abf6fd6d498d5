"""What this package costs NxDI: time and memory of the conversion, time and operations of a layer.

    NXDI_EXPERTSCALE_UPSTREAM=FOLDER python -m benchmarks.overhead [--release 0.9] [--json]

One layer of Qwen3-30B-A3B's size goes through a release's real sources on a CPU (see
``tests/upstream``). What the package adds to NxDI's converter is timed while that is made faster,
as it is by default; its share is that of NxDI's converter as it is, in another process
(:mod:`benchmarks.conversion` measures how much faster it is made). The check of the whole model,
which comes after it, is timed by itself. Memory is that of processes of their own, with and
without the package in force.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import folder_check
from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.checkpoint.read.config import read_config
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST
from nxdi_expertscale.evaluation.architecture import LM_HEAD, derive_architecture
from nxdi_expertscale.families.built_in import QWEN3_MOE
from nxdi_expertscale.loading import put_off
from nxdi_expertscale.loading.fused_sample import FusedSample
from tests.harness import targets

LAYER: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 1024,
    "hidden_size": 2048,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "pad_token_id": 0,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}
"""Qwen3-30B-A3B's ``config.json``, with one layer and a small vocabulary."""

REPETITIONS = 5
TOKENS = 32
"""Few enough for NxDI to run all experts on all of them; with more it indexes the scales by expert,
which on a CPU fails where there is one for all."""
CONVERSIONS = ("slow_conversion", "conversion")
"""NxDI's converter as it is, and made faster."""
CONVERTER = "convert_qwen3_moe_hf_to_neuron_state_dict"


def make_checkpoint(folder: Path) -> None:
    """Write the layer with random weights in bfloat16."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    model = derive_architecture(read_config(LAYER, QWEN3_MOE, "config.json"), QWEN3_MOE)
    weights = {
        name if name == LM_HEAD else f"model.{name}": (
            torch.randn(shape, generator=generator) * 0.02
        ).to(torch.bfloat16)
        for name, shape in model.shapes()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LAYER))


# In a process that has NxDI's sources


def settings(
    nxdi: Any, quantized: Path, *, expert_wise: bool, tokens: int = TOKENS
) -> dict[str, Any]:
    """Keywords of ``MoENeuronConfig`` for the FP8 checkpoint and contexts of ``tokens``."""
    return {
        **nxdi.FP8,
        "quantized_checkpoints_path": str(quantized),
        "modules_to_not_convert": [nxdi.ROUTER],
        "expert_wise_scale": expert_wise,
        "torch_dtype": torch.bfloat16,
        "seq_len": tokens,
        "max_context_length": tokens,
    }


def conversion(
    nxdi: Any, model: Path, quantized: Path, *, tokens: int = TOKENS
) -> dict[str, float]:
    """Seconds of NxDI's converter, and of what this package adds; each the best of several runs."""
    module = sys.modules[nxdi.application_cls(model).__module__]
    patched: Any = getattr(module, CONVERTER)
    seconds: dict[str, list[float]] = {"upstream": [], "package": [], "comparison": []}
    with _timed_comparison() as comparison:

        def timed(*args: Any, **kwargs: Any) -> Any:
            comparison.clear()
            inside = 0.0

            def upstream(neuron_state_dict: Any, config: Any) -> Any:
                nonlocal inside
                before, started = sum(comparison), time.perf_counter()
                converted = patched.__wrapped__(neuron_state_dict, config)
                inside = time.perf_counter() - started - (sum(comparison) - before)
                return converted

            started = time.perf_counter()
            converted = patched._self_wrapper(upstream, None, args, kwargs)
            seconds["package"].append(time.perf_counter() - started - inside)
            seconds["upstream"].append(inside)
            seconds["comparison"].append(sum(comparison))
            return converted

        setattr(module, CONVERTER, timed)
        try:
            for _ in range(REPETITIONS):
                nxdi.convert(model, **settings(nxdi, quantized, expert_wise=True, tokens=tokens))
        finally:
            setattr(module, CONVERTER, patched)
    return {name: min(values) for name, values in seconds.items()}


@contextmanager
def _timed_comparison() -> Iterator[list[float]]:
    """Seconds that it takes to compare all experts with the fused weights, step by step."""
    seconds: list[float] = []

    def timed(step: Any) -> Any:
        def run(*args: Any) -> Any:
            started = time.perf_counter()
            result = step(*args)
            seconds.append(time.perf_counter() - started)
            return result

        return run

    steps = {name: getattr(FusedSample, name) for name in ("take", "is_in")}
    for name, step in steps.items():
        setattr(FusedSample, name, timed(step))
    try:
        yield seconds
    finally:
        for name, step in steps.items():
            setattr(FusedSample, name, step)


def whole_model_check(
    nxdi: Any, model: Path, quantized: Path, *, tokens: int = TOKENS
) -> dict[str, float]:
    """Seconds of the check that nothing is lost between the state dict and the model's modules."""
    from nxdi_expertscale.loading import completeness

    find_faults = completeness.find_faults
    seconds: list[float] = []

    def timed(*args: Any) -> Any:
        for _ in range(REPETITIONS):
            started = time.perf_counter()
            faults = find_faults(*args)
            seconds.append(time.perf_counter() - started)
        return faults

    completeness.find_faults = timed
    try:
        nxdi.load(model, **settings(nxdi, quantized, expert_wise=True, tokens=tokens))
    finally:
        completeness.find_faults = find_faults
    return {"seconds": min(seconds)}


class _Operations(TorchDispatchMode):
    """Counts the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def forward(
    nxdi: Any, model: Path, quantized: Path, *, tokens: int = TOKENS
) -> dict[str, dict[str, float]]:
    """Seconds, operations and bytes of scales of the quantized experts, for each kind of scales."""
    loaded = {
        name: nxdi.load(model, **settings(nxdi, quantized, expert_wise=flag, tokens=tokens))
        for name, flag in (("expert_wise", True), ("per_channel", False))
    }
    hidden_size = json.loads((model / "config.json").read_bytes())["hidden_size"]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, tokens, hidden_size, generator=generator).to(torch.bfloat16)
    seconds: dict[str, list[float]] = {name: [] for name in loaded}
    for _ in range(REPETITIONS):
        for name, instance in loaded.items():
            started = time.perf_counter()
            nxdi.moe_output(instance, 0, inputs)
            seconds[name].append(time.perf_counter() - started)
    found = {}
    for name, instance in loaded.items():
        with _Operations() as operations:
            nxdi.moe_output(instance, 0, inputs)
        with FlopCounterMode(display=False) as flops:
            nxdi.moe_output(instance, 0, inputs)
        experts = instance.module.layers[0].mlp.expert_mlps.mlp_op
        found[name] = {
            "seconds": min(seconds[name]),
            "operations": operations.counts.total(),
            "gigaflops": flops.get_total_flops() / 1e9,
            "scale_bytes": sum(p.nbytes for n, p in experts.named_parameters() if "scale" in n),
            "weight_bytes": sum(p.nbytes for n, p in experts.named_parameters() if "weight" in n),
        }
    return found


def child(task: str, release: str, model: Path, quantized: Path) -> dict[str, Any]:
    """One measurement, in a process that can import one release."""
    torch.set_num_threads(1)
    if task != "without":
        import nxdi_expertscale

        nxdi_expertscale.activate()
    with targets.all_targets()[release].on_one_rank() as nxdi:
        if task in ("conversion", "slow_conversion"):
            return conversion(nxdi, model, quantized)
        if task == "whole_model_check":
            return whole_model_check(nxdi, model, quantized)
        if task == "forward":
            return forward(nxdi, model, quantized)
        chosen = settings(nxdi, quantized, expert_wise=True)
        if task == "without":
            del chosen["expert_wise_scale"]
        nxdi.convert(model, **chosen)
        # Kibibytes, on Linux
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


# In the process that was started


def measure(task: str, release: str, model: Path, quantized: Path) -> Any:
    variables = {"NXDI_PLUGINS": "" if task == "without" else "expertscale"}
    if task == "slow_conversion":
        variables[put_off.VARIABLE] = "0"
    return in_child("benchmarks.overhead", task, release, model, quantized, **variables)


def in_child(
    module: str, task: str, release: str, model: Path, quantized: Path, **variables: str
) -> Any:
    """What a benchmark measures in a process of its own.

    Args:
        module: The benchmark, which takes the options of :func:`parse_options`.
        task: What it is to measure.
        release: The release of NxDI.
        model: Folder of the original.
        quantized: Folder of what was made of it.
        variables: Environment variables of that process.
    """
    command = [sys.executable, "-m", module, "--child", task]
    command += ["--release", release, "--folders", str(model), str(quantized)]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def without_manifest(quantized: Path) -> Iterator[None]:
    """A folder that does not say of itself that its weights are in range."""
    manifest = quantized / MANIFEST
    content = manifest.read_bytes()
    manifest.unlink()
    try:
        yield
    finally:
        manifest.write_bytes(content)


def of_nxdi(release: str) -> dict[str, Any]:
    """Everything that is measured with NxDI's sources."""
    with tempfile.TemporaryDirectory() as folder:
        model, quantized = Path(folder, "model"), Path(folder, "fp8")
        make_checkpoint(model)
        quantize_checkpoint(model, quantized)
        found = {
            "release": release,
            **{task: measure(task, release, model, quantized) for task in CONVERSIONS},
        }
        with without_manifest(quantized):
            found["conversion_without_manifest"] = measure("conversion", release, model, quantized)
        found["whole_model_check"] = measure("whole_model_check", release, model, quantized)
        found["peak"] = {
            name: measure(name, release, model, quantized)["peak_bytes"]
            for name in ("with", "without")
        }
        found["forward"] = measure("forward", release, model, quantized)
        found["folder"] = folder_check.measure(model, quantized)
        return found


def nxdi_table(found: dict[str, Any]) -> Table:
    table = Table("one layer of Qwen3-30B-A3B", title=f"NxDI {found['release']}, on a CPU")
    for column in ("NxDI alone", "with this package", "the package's part"):
        table.add_column(column, justify="right")
    upstream = found["slow_conversion"]["upstream"]
    names = {
        "conversion": "conversion, folder of our quantizer",
        "conversion_without_manifest": "conversion, any other (range checked)",
    }
    for key, name in names.items():
        package = found[key]["package"]
        table.add_row(
            name,
            f"{upstream:.2f} s",
            f"{found[key]['upstream'] + package:.2f} s",
            f"{1000 * package:.1f} ms, {package / upstream:.2%}",
        )
    checks = {
        "of it: all experts compared with the fused weights": found["conversion"]["comparison"],
        "check that nothing is lost on the way to the modules": found["whole_model_check"][
            "seconds"
        ],
    }
    for name, check in checks.items():
        table.add_row(name, "", "", f"{1000 * check:.1f} ms, {check / upstream:.2%}")
    table.add_row("conversion, peak memory", *peak_cells(found["peak"]))
    shared, own = found["forward"]["per_channel"], found["forward"]["expert_wise"]
    table.add_row(
        f"experts' forward, {TOKENS} tokens",
        f"{shared['seconds']:.2f} s",
        f"{own['seconds']:.2f} s",
        f"{own['seconds'] / shared['seconds']:.3f} times",
    )
    for key in ("operations", "gigaflops", "scale_bytes", "weight_bytes"):
        table.add_row(
            f"experts' {key.replace('_', ' ')}",
            f"{shared[key]:,.0f}",
            f"{own[key]:,.0f}",
            f"{own[key] - shared[key]:+,.0f}",
        )
    return table


def peak_cells(peak: dict[str, float]) -> tuple[str, str, str]:
    """The cells of a row about memory: without the package, with it, and the difference."""
    before, after = peak["without"], peak["with"]
    difference = f"{(after - before) / 1e6:+.0f} MB"
    return f"{before / 1e9:.2f} GB", f"{after / 1e9:.2f} GB", difference


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options of a benchmark that runs a release in processes of its own."""
    parser.add_argument("--release", default="0.9", help="the release of NxDI to measure")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is None and options.release not in targets.all_targets():
        parser.error(f"no sources of NxDI {options.release} in {targets.UPSTREAM_VARIABLE}")
    return options


def main() -> None:
    options = parse_options(argparse.ArgumentParser(description=__doc__))
    if options.child is not None:
        print(json.dumps(child(options.child, options.release, *options.folders)))
        return
    found = of_nxdi(options.release)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        Console(width=110).print(nxdi_table(found))
        print("\n".join(folder_check.lines(found["folder"])))


if __name__ == "__main__":
    main()
