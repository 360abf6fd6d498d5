"""The benchmark for the device, step by step, with the real programs, on a model that was trained.

It serves bfloat16, one scale per expert and averaged scales, one after the other, and asks each
with EleutherAI's ``lm_eval`` and with ``vllm bench serve`` over HTTP.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.lm_eval_task import GENERATION, write_tasks
from nxdi_expertscale.evaluation.small_model import python_library
from tests.server import served
from tests.server.conftest import Host
from tests.server.serving import free_port

_LIMIT = 3000
QUESTIONS = 60
PROMPTS = 4
VARIANTS = ("bfloat16", "expert-wise", "averaged")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows its text."""
    return served.save_trained(tmp_path_factory.mktemp("models") / "trained")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions on text of the same kind."""
    return write_tasks(tmp_path_factory.mktemp("tasks"), python_library().held_out)


def benchmark(host: Host, trained: Path, tasks: Path, *options: str) -> str:
    """Run the benchmark; what it prints."""
    command = [
        *(sys.executable, "-m", "tests.server.device_benchmark", str(trained)),
        *(str(host.folder / "work"), "--tp-degree", "1", "--max-model-len", "256"),
        *("--port", str(free_port())),
        *("--tasks", GENERATION, "--include-path", str(tasks), "--limit", str(QUESTIONS)),
        *("--prompts", str(PROMPTS), "--tokens", "16", *options),
    ]
    result = subprocess.run(
        command,
        env=host.environment(HF_HOME=str(host.folder / "huggingface")),
        cwd=host.folder,
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=False,
    )
    logs = sorted((host.folder / "work").glob("*/server.log"))
    shown = result.stdout + result.stderr + "".join(log.read_text()[-5000:] for log in logs)
    assert result.returncode == 0, shown[-20_000:]
    return result.stdout


def test_it_runs_with_the_real_programs(
    host: Host, trained: Path, tasks: Path, record_property: Callable[[str, object], None]
) -> None:
    planned = benchmark(host, trained, tasks, "--dry-run")
    assert "absent" not in planned
    assert planned.count("vllm serve") == len(VARIANTS)

    benchmark(host, trained, tasks)

    answers, right = {}, {}
    for variant in VARIANTS:
        folder = host.folder / "work" / variant
        (samples,) = folder.glob("lm_eval/**/samples_*.jsonl")
        (results,) = folder.glob("lm_eval/**/results_*.json")
        found = map(json.loads, samples.read_text().splitlines())
        answers[variant] = {sample["doc_id"]: sample["filtered_resps"] for sample in found}
        right[variant] = json.loads(results.read_text())["results"][GENERATION]["exact_match,none"]
        assert json.loads((folder / "throughput.json").read_text())["completed"] == PROMPTS
    same = {
        variant: share_of_same(found, answers["bfloat16"]) for variant, found in answers.items()
    }
    record_property("exact_match", right)
    record_property("same_as_bfloat16", same)

    assert len(answers["bfloat16"]) == QUESTIONS
    assert same["expert-wise"] > 0.85, (same, right)
    assert same["averaged"] < 0.7, (same, right)


def share_of_same(answers: dict[int, list[str]], others: dict[int, list[str]]) -> float:
    """The share of questions that are answered alike."""
    return sum(answers[question] == others[question] for question in others) / len(others)
