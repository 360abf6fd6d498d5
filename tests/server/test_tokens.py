"""``vllm.LLM`` gives Hugging Face's tokens, several requests at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from nxdi_expertscale import quantize_checkpoint
from nxdi_expertscale.checkpoint import read_manifest
from tests.server.conftest import DTYPES, WAYS, Answers, Host, override
from tests.server.served import PROMPTS, TOKENS

ENGINE = {"max_model_len": 128, "max_num_seqs": 4, "enable_prefix_caching": False}
"""What vLLM-Neuron needs of vLLM's own settings."""

_LIMIT = 1500


def ask(
    host: Host,
    model: Path | str,
    settings: dict[str, Any],
    *,
    variables: Mapping[str, str] = MappingProxyType({}),
    **engine: Any,
) -> list[list[int]]:
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
        env=host.environment(**variables),
        # vLLM-Neuron saves models here.
        cwd=host.folder,
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=False,
    )
    (host.folder / "server.log").write_text(result.stdout + result.stderr)
    assert result.returncode == 0, (result.stdout + result.stderr)[-20_000:]
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


HUB_ID, COMMIT = "someone/Tiny-MoE", "0123456789abcdef0123456789abcdef01234567"


def put_on_hub(home: Path, checkpoint: Path) -> Path:
    """Lay a checkpoint in a cache of the Hub as its client does; the snapshot's folder."""
    repository = home / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot: Path = shutil.copytree(checkpoint, repository / "snapshots" / COMMIT)
    return snapshot


def test_model_of_the_hub_uses_a_folder_made_from_its_snapshot(
    host: Host, moe: Path, answers: Answers
) -> None:
    """Offline, vLLM itself looks the id up in the Hub's cache."""
    home, folder = host.folder / "huggingface", host.folder / "fp8"
    snapshot = put_on_hub(home, moe)
    quantize_checkpoint(snapshot, folder)
    made = read_manifest(folder).digest

    tokens = ask(
        host,
        HUB_ID,
        override("expert-wise", folder),
        variables={"HF_HOME": str(home)},
        dtype="float32",
    )

    assert tokens == answers.of("expert-wise", "float32")
    assert read_manifest(folder).digest == made


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
