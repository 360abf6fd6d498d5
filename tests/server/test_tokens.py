"""``vllm.LLM`` gives Hugging Face's tokens, several requests at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.installed import ROOT
from tests.server.conftest import DTYPES, WAYS, Answers, Host, override
from tests.server.served import PROMPTS, TOKENS

ENGINE = {"max_model_len": 128, "max_num_seqs": 4, "enable_prefix_caching": False}
"""What vLLM-Neuron needs of vLLM's own settings."""

_LIMIT = 1500


def ask(host: Host, model: Path, settings: dict[str, Any], **engine: Any) -> list[list[int]]:
    """The tokens of ``vllm.LLM`` in a process of its own."""
    task = {
        "engine": {
            "model": str(model),
            **ENGINE,
            "additional_config": {"override_neuron_config": settings},
            **engine,
        },
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "answer": str(host.folder / "answer.json"),
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.server.offline"],
        input=json.dumps(task),
        env=host.environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-20_000:]
    (host.folder / "server.log").write_text(result.stdout + result.stderr)
    answers: list[list[int]] = json.loads((host.folder / "answer.json").read_text())
    return answers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_llm_gives_hugging_faces_tokens(
    host: Host,
    moe: Path,
    fp8: Path,
    answers: Answers,
    way: str,
    dtype: str,
    record_property: Callable[[str, object], None],
) -> None:
    tokens = ask(host, moe, override(way, fp8), dtype=dtype)

    record_property("tokens", tokens)
    assert tokens == answers.of(way, dtype)


def test_the_ways_differ(answers: Answers) -> None:
    assert answers.of("expert-wise", "float32") != answers.of("averaged", "float32")
    assert answers.of("unquantized", "float32") != answers.of("averaged", "float32")


def test_draft_and_target(host: Host, moe: Path, fp8: Path, answers: Answers) -> None:
    """The draft is the target itself, so that it is right about every token.

    NxDI converts both models, so a draft's checkpoint has to be quantized as well.
    """
    speculation = {"model": str(fp8), "num_speculative_tokens": 3, "method": "draft_model"}

    tokens = ask(
        host, moe, override("expert-wise", fp8), dtype="float32", speculative_config=speculation
    )

    assert tokens == answers.of("expert-wise", "float32")


def test_tensor_parallel(host: Host, moe: Path, fp8: Path, answers: Answers) -> None:
    tokens = ask(host, moe, override("expert-wise", fp8), dtype="float32", tensor_parallel_size=2)

    assert tokens == answers.of("expert-wise", "float32")
