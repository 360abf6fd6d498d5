"""What is run on the device, as commands: nothing is started here.

What the seed of this project measured on a trn2.3xlarge with Qwen3-30B-A3B (NxDI's pull request
35): the same tasks, the same lengths, for bfloat16, for FP8 with one scale per expert, and for
FP8 with averaged ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nxdi_expertscale.settings import device_variables

TASKS = ("ifeval", "truthfulqa_gen")
LIMIT = 100
TOKENS = 128
PROMPTS = 100


@dataclass(frozen=True)
class Variant:
    """A way to serve the model.

    Attributes:
        name: Its name, and that of its folder.
        override: Settings of ``MoENeuronConfig`` beside those that vLLM-Neuron makes.
    """

    name: str
    override: dict[str, Any]


@dataclass(frozen=True)
class Server:
    """A server, and the port at which it answers."""

    port: int
    command: tuple[str, ...]
    environment: dict[str, str]
    log: Path


@dataclass(frozen=True)
class Step:
    """A command, and the file that is there once it succeeded.

    Attributes:
        name: What it does, for people.
        command: The program and its arguments.
        output: A file, or a folder of files, that it writes.
        done: A file that is written after it succeeded; where it is, the step is left out.
        server: What has to be running meanwhile.
        environment: Variables that it needs.
    """

    name: str
    command: tuple[str, ...]
    output: Path
    done: Path
    server: Server | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What the user chose.

    Attributes:
        model: Folder of the model in bfloat16.
        work: Folder for everything that is made.
        tp_degree: Tensor parallel degree; 4 logical cores are all of a trn2.3xlarge.
        max_model_len: Longest sequence. IFEval asks for up to 1280 tokens.
        port: Where the servers answer, one after the other.
        tasks: What ``lm_eval`` asks.
        include_path: Folder of tasks of one's own.
        limit: How many questions of a task are asked.
        prompts: Number of prompts whose throughput is measured.
        tokens: Their length, and that of their answers.
    """

    model: Path
    work: Path
    tp_degree: int = 4
    max_model_len: int = 2048
    port: int = 8000
    tasks: tuple[str, ...] = TASKS
    include_path: Path | None = None
    limit: int = LIMIT
    prompts: int = PROMPTS
    tokens: int = TOKENS

    @property
    def quantized(self) -> Path:
        """The FP8 checkpoint."""
        return self.work / "fp8"


def variants(setup: Setup) -> tuple[Variant, ...]:
    """The three ways, in the order in which they are measured."""
    fp8 = {
        "quantized": True,
        "quantized_checkpoints_path": str(setup.quantized),
        "quantization_type": "per_channel_symmetric",
        "quantization_dtype": "f8e4m3",
    }
    return (
        Variant("bfloat16", {}),
        Variant("expert-wise", {**fp8, "expert_wise_scale": True}),
        Variant("averaged", {**fp8, "expert_wise_scale": False}),
    )


def steps(setup: Setup) -> list[Step]:
    """Everything that is to be done, in order."""
    quantize = Step(
        name="quantize",
        command=("nxdi-expertscale", "quantize", str(setup.model), str(setup.quantized)),
        output=setup.quantized,
        done=setup.work / "quantize.done",
    )
    return [quantize, *(step for variant in variants(setup) for step in _measure(setup, variant))]


def _measure(setup: Setup, variant: Variant) -> list[Step]:
    folder = setup.work / variant.name
    server = _server(setup, variant, folder)
    url = f"http://127.0.0.1:{setup.port}"
    answers = ",".join(
        [
            f"model={setup.model}",
            f"base_url={url}/v1/completions",
            "num_concurrent=1",
            "tokenized_requests=False",
        ]
    )
    ask = ["lm_eval", "--model", "local-completions", "--model_args", answers]
    ask += ["--tasks", ",".join(setup.tasks), "--num_fewshot", "0", "--limit", str(setup.limit)]
    if setup.include_path is not None:
        ask += ["--include_path", str(setup.include_path)]
    ask += ["--output_path", str(folder / "lm_eval"), "--log_samples"]
    load = ["vllm", "bench", "serve", "--model", str(setup.model), "--base-url", url]
    load += ["--dataset-name", "random", "--random-input-len", str(setup.tokens)]
    load += ["--random-output-len", str(setup.tokens), "--num-prompts", str(setup.prompts)]
    load += ["--max-concurrency", "1", "--ignore-eos", "--save-result"]
    load += ["--result-dir", str(folder), "--result-filename", "throughput.json"]
    return [
        Step(
            name=f"{variant.name}: answers",
            command=tuple(ask),
            output=folder / "lm_eval",
            done=folder / "lm_eval.done",
            server=server,
            environment={"OPENAI_API_KEY": "none"},
        ),
        Step(
            name=f"{variant.name}: throughput",
            command=tuple(load),
            output=folder / "throughput.json",
            done=folder / "throughput.done",
            server=server,
        ),
    ]


def _server(setup: Setup, variant: Variant, folder: Path) -> Server:
    command = ["vllm", "serve", str(setup.model), "--port", str(setup.port)]
    command += ["--tensor-parallel-size", str(setup.tp_degree), "--max-num-seqs", "1"]
    command += ["--max-model-len", str(setup.max_model_len), "--no-enable-prefix-caching"]
    command += ["--additional-config", json.dumps({"override_neuron_config": variant.override})]
    # vLLM-Neuron keeps what it compiled there, so a second start takes minutes and not an hour.
    environment = {"NEURON_COMPILED_ARTIFACTS": str(folder / "compiled")}
    if variant.override:
        environment |= dict.fromkeys(device_variables.VARIABLES, device_variables.ON)
    return Server(setup.port, tuple(command), environment, folder / "server.log")
