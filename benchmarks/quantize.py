"""Quantizing a checkpoint: this package, NxDI's own step, llm-compressor, and a plain copy.

    python -m benchmarks.quantize [--gigabytes 2.5] [--repeat 3] [--busy] [--json]
        [--before FOLDER] [--upstream FOLDER] [--llmcompressor PYTHON]

Each runs as a process of its own on the same input, which is in the page cache, and writes to the
same disk; wall time, CPU time (user and system) and peak resident memory are the process's, the
step's time is measured inside it, torch imported. They take turns, and the best of the
repetitions counts. A peer that is not there is left out, and named. ``--before`` is a folder with
an earlier state of this repository; ``--busy`` occupies all cores with other processes.

``--upstream`` is a folder with a release's sources, ``nxdi/src`` and ``nxd/src`` (as ``0.9`` in
``NXDI_EXPERTSCALE_UPSTREAM``); ``--llmcompressor`` is a Python that has llm-compressor installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import busy

HIDDEN, INNER, EXPERTS, VOCABULARY = 2048, 768, 128, 8192
LAYER_BYTES = 2 * (3 * EXPERTS * HIDDEN * INNER + HIDDEN * (2 * 4096 + 2 * 512))
SHARD_BYTES = 4_000_000_000
"""As large as the shards of published checkpoints."""

REPOSITORY = Path(__file__).parent.parent

OURS = """
import sys
import torch
from nxdi_expertscale import quantize_checkpoint
print("STEP", quantize_checkpoint(sys.argv[1], sys.argv[2]).seconds)
"""

ON_ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
"""

COPY = """
import shutil, sys, time
started = time.perf_counter()
shutil.copytree(sys.argv[1], sys.argv[2])
print("STEP", time.perf_counter() - started)
"""

NXDI = """
import sys, time
from pathlib import Path
from tests.harness import targets
targets.release(Path(sys.argv[3])).prepare()
from tests.harness import running
started = time.perf_counter()
running.quantize(Path(sys.argv[1]), Path(sys.argv[2]))
print("STEP", time.perf_counter() - started)
"""

LLM_COMPRESSOR = """
import sys, time
from llmcompressor import model_free_ptq
started = time.perf_counter()
model_free_ptq(sys.argv[1], sys.argv[2], scheme="FP8_DYNAMIC", device="cpu",
               ignore=["re:.*mlp.gate$", "model.embed_tokens"])
print("STEP", time.perf_counter() - started)
"""


# What getrusage calls the peak of a child has the peak of its parent in it.
PEAK = """
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class Command:
    """A process: its arguments, and the folder that it imports from."""

    arguments: Sequence[str]
    folder: Path


@dataclass(frozen=True)
class Measurement:
    """The best of several runs: seconds, and megabytes of peak resident memory."""

    process_seconds: float
    step_seconds: float
    cpu_seconds: float
    peak_megabytes: float


def main() -> None:
    arguments = parse_arguments()
    commands, left_out = find_commands(arguments)
    extra = [str(Path(arguments.upstream).resolve())] if arguments.upstream else []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source = Path(folder, "source")
        nbytes = make_checkpoint(source, arguments.gigabytes)
        with busy.occupied_cores(are_occupied=arguments.busy):
            measured = best_of_each(
                commands, source, Path(folder, "output"), extra, arguments.repeat
            )
    result = {
        "source_bytes": nbytes,
        **busy.machine(),
        "busy": arguments.busy,
        "measured": {name: asdict(value) for name, value in measured.items()},
        "times_as_fast": {
            name: {
                "process": value.process_seconds / measured["nxdi-expertscale"].process_seconds,
                "step": value.step_seconds / measured["nxdi-expertscale"].step_seconds,
            }
            for name, value in measured.items()
        },
        "left_out": left_out,
    }
    print(json.dumps(result, indent=2) if arguments.json else table(result, measured))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the input")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each, of which the best")
    parser.add_argument("--folder", help="where to work; needs thrice the size of the input")
    parser.add_argument("--before", type=Path, help="an earlier state of this repository")
    parser.add_argument("--busy", action="store_true", help="with all cores occupied")
    parser.add_argument("--upstream", help="sources of a release: nxdi/src and nxd/src")
    parser.add_argument("--llmcompressor", help="a Python that has llm-compressor")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def find_commands(
    arguments: argparse.Namespace,
) -> tuple[dict[str, Command], dict[str, str]]:
    """What is measured, by its name, and what is left out, with the reason."""

    def python(code: str, folder: Path = REPOSITORY, python: str = sys.executable) -> Command:
        return Command((python, "-c", code + PEAK), folder)

    commands = {"nxdi-expertscale": python(OURS)}
    left_out = {}
    if arguments.before:
        commands["nxdi-expertscale before"] = python(OURS, arguments.before.resolve())
    commands["nxdi-expertscale, one core"] = python(ON_ONE_CORE + OURS)
    commands["plain copy"] = python(COPY)
    if arguments.upstream:
        commands["NxDI save_quantized_state_dict"] = python(NXDI)
    else:
        left_out["NxDI save_quantized_state_dict"] = "--upstream names no sources"
    if arguments.llmcompressor:
        name = "llm-compressor model_free_ptq"
        commands[name] = python(LLM_COMPRESSOR, python=arguments.llmcompressor)
    else:
        left_out["llm-compressor model_free_ptq"] = "--llmcompressor names no Python"
    return commands, left_out


def best_of_each(
    commands: Mapping[str, Command], source: Path, output: Path, extra: Sequence[str], repeat: int
) -> dict[str, Measurement]:
    """The best run of each command; they take turns."""
    runs: dict[str, list[Measurement]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            shutil.rmtree(output, ignore_errors=True)
            runs[name].append(run(command, [str(source), str(output), *extra]))
    shutil.rmtree(output)
    return {
        name: min(found, key=lambda measured: measured.process_seconds)
        for name, found in runs.items()
    }


def run(command: Command, arguments: Sequence[str]) -> Measurement:
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            [*command.arguments, *arguments],
            stdout=printed,
            stderr=subprocess.STDOUT,
            cwd=command.folder,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        elapsed = time.perf_counter() - started
        printed.seek(0)
        lines = printed.read().splitlines()
    if status != 0:
        sys.exit("\n".join([f"{command.arguments[:1]} failed:", *lines[-20:]]))
    step = next(float(line.split()[1]) for line in lines if line.startswith("STEP "))
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return Measurement(elapsed, step, usage.ru_utime + usage.ru_stime, kibibytes * 1024 / 1e6)


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write Qwen3-30B-A3B's layers, as many as make the size; its bytes."""
    layers = max(1, round(gigabytes * 1e9 / LAYER_BYTES))
    folder.mkdir()
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": 6144,
        "moe_intermediate_size": INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": VOCABULARY,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40960,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    shards = list(in_shards(weights(layers)))
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(materialized(shard)), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys((name for name, _ in shard), file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def weights(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.self_attn.q_norm.weight", (128,)
        yield f"{prefix}.self_attn.k_norm.weight", (128,)
        yield f"{prefix}.self_attn.q_proj.weight", (4096, HIDDEN)
        yield f"{prefix}.self_attn.k_proj.weight", (512, HIDDEN)
        yield f"{prefix}.self_attn.v_proj.weight", (512, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN, 4096)
        yield f"{prefix}.mlp.gate.weight", (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", (INNER, HIDDEN)
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", (INNER, HIDDEN)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (HIDDEN, INNER)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


Shard = list[tuple[str, tuple[int, ...]]]


def in_shards(tensors: Iterator[tuple[str, tuple[int, ...]]]) -> Iterator[Shard]:
    shard: Shard = []
    size = 0
    for name, shape in tensors:
        if size > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, shape))
        size += 2 * math.prod(shape)
    yield shard


def materialized(shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a shard, with numbers that are quick to make."""
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) / 50
    for seed, (name, shape) in enumerate(shard):
        repeats = -(-math.prod(shape) // numbers.numel())
        values = numbers.roll(seed).repeat(repeats)[: math.prod(shape)].view(shape)
        yield name, (values * 2.0 ** (seed % 5)).to(torch.bfloat16)


def table(result: dict[str, object], measured: dict[str, Measurement]) -> str:
    ours, copied = measured["nxdi-expertscale"], measured["plain copy"]
    state = "all of them occupied" if result["busy"] else f"load {result['load']}"
    lines = [
        f"{result['cores']} cores, {state}",
        f"{'':32}{'process':>10}{'CPU':>10}{'step':>10}{'of a copy':>11}{'memory':>10}"
        f"{'we are as fast':>24}",
    ]
    for name, value in measured.items():
        times = (
            f"{value.process_seconds / ours.process_seconds:.1f} x, step "
            f"{value.step_seconds / ours.step_seconds:.1f} x"
        )
        lines.append(
            f"{name:32}{value.process_seconds:8.1f} s{value.cpu_seconds:8.1f} s"
            f"{value.step_seconds:8.1f} s{value.step_seconds / copied.step_seconds:9.1f} x"
            f"{value.peak_megabytes:7.0f} MB{times:>24}"
        )
    left_out = result["left_out"]
    assert isinstance(left_out, dict)
    lines += [f"left out: {name}: {why}" for name, why in left_out.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
