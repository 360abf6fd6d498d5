"""``vllm.LLM`` gives Hugging Face's tokens, several requests at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nxdi_expertscale import quantize_checkpoint
from tests.server import hub, served
from tests.server.conftest import DTYPES, WAYS, Answers, Host, override
from tests.server.served import PROMPTS, TOKENS, state

ENGINE = {"max_model_len": 128, "max_num_seqs": 4, "enable_prefix_caching": False}
"""What vLLM-Neuron needs of vLLM's own settings."""

_LIMIT = 1500


def ask(
    host: Host,
    model: Path | str,
    settings: dict[str, Any],
    *,
    prompts: Sequence[Sequence[int]] = PROMPTS,
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
        "prompts": prompts,
        "tokens": TOKENS,
        "answer": str(host.folder / "answer.json"),
        "cached": str(host.folder / "cached.json"),
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


def log_of(host: Host) -> str:
    """What ``vllm.LLM`` and its engine wrote."""
    return (host.folder / "server.log").read_text()


LOGGED = {
    "expert-wise": ["8 scales per channel, one for each expert (expert_wise_scale is on)"],
    "averaged": ["(expert_wise_scale is off)"],
    "unquantized": [],
}
"""What the one line in the log says of the experts."""


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

    loaded = [line for line in log_of(host).splitlines() if "FP8 experts" in line]
    record_property("tokens", tokens)
    record_property("log", loaded)
    assert len(loaded) == len(LOGGED[way])
    assert all(says in line for says, line in zip(LOGGED[way], loaded, strict=True))
    assert answers.allow(tokens, way, dtype), (tokens, answers.of(way, dtype))


def put_on_hub(home: Path, checkpoint: Path) -> Path:
    """Lay a checkpoint in a cache of the Hub as its client does; the snapshot's folder."""
    repository = home / "hub" / f"models--{hub.REPOSITORY.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(hub.COMMIT)
    snapshot: Path = shutil.copytree(checkpoint, repository / "snapshots" / hub.COMMIT)
    return snapshot


def test_model_of_the_hub(host: Host, moe: Path) -> None:
    """vLLM-Neuron saves a copy in float32, and gives that to NxDI as the source.

    A folder made of the snapshot fits the copy, and one made of the copy fits the snapshot.
    """
    home = host.folder / "huggingface"
    snapshot = put_on_hub(home, served.round_to_bfloat16(moe, host.folder / "published"))
    of_snapshot, of_copy = host.folder / "of-snapshot", host.folder / "of-copy"
    quantize_checkpoint(snapshot, of_snapshot)
    dequantized = served.dequantize(of_snapshot, host.folder / "dequantized", averaged=False)
    expected = served.answers_of_hugging_face(dequantized, torch.float32)
    made = state(of_snapshot)

    with hub.serving(snapshot) as address:
        online = {"HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        settings = override("expert-wise", of_snapshot)
        tokens = ask(host, hub.REPOSITORY, settings, variables=online, dtype="float32")
    copy = host.folder / "local-models" / hub.REPOSITORY
    assert "torch.float32" in {str(tensor.dtype) for tensor in tensors_of(copy)}
    assert tokens == expected
    assert state(of_snapshot) == made

    # Offline, vLLM takes the snapshot itself.
    quantize_checkpoint(copy, of_copy)
    made = state(of_copy)
    settings = override("expert-wise", of_copy)
    tokens = ask(host, hub.REPOSITORY, settings, variables={"HF_HOME": str(home)}, dtype="float32")
    assert tokens == expected
    assert state(of_copy) == made


def tensors_of(checkpoint: Path) -> list[torch.Tensor]:
    """The tensors of all files."""
    return [
        tensor for file in checkpoint.glob("*.safetensors") for tensor in load_file(file).values()
    ]


SHARED = list(range(100, 164))
"""The beginning of two prompts: two blocks of a cache of prefixes."""


def test_prefix_caching(host: Host, moe: Path, fp8: Path, answers: Answers) -> None:
    """It needs a block size, and nothing else."""
    prompts = [[*SHARED, 7, 8, 9], [*SHARED, 3, 2]]

    tokens = ask(
        host,
        moe,
        override("expert-wise", fp8),
        prompts=prompts,
        dtype="float32",
        enable_prefix_caching=True,
        block_size=32,
    )

    assert tokens == served.answers_of_hugging_face(
        answers.models["expert-wise"], torch.float32, prompts
    )
    assert json.loads((host.folder / "cached.json").read_text()) == [0, len(SHARED)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_way_is_not_taken_for_another(answers: Answers, dtype: str) -> None:
    for way in WAYS:
        allowed = [other for other in WAYS if answers.allow(answers.of(other, dtype), way, dtype)]
        assert allowed == [way]


@pytest.mark.parametrize("draft", ["fp8", "dense_fp8"])
def test_draft_and_target(
    host: Host,
    moe: Path,
    fp8: Path,
    answers: Answers,
    draft: str,
    request: pytest.FixtureRequest,
) -> None:
    """A draft that is the target itself is right about every token, a dense one hardly ever is.

    NxDI converts both models, so a draft's checkpoint has to be quantized as well.
    """
    if host.release.vllm < "0.16":
        pytest.skip("this vLLM refuses a draft model: 'not supported yet'")
    speculation = {
        "model": str(request.getfixturevalue(draft)),
        "num_speculative_tokens": 3,
        "method": "draft_model",
    }

    tokens = ask(
        host, moe, override("expert-wise", fp8), dtype="float32", speculative_config=speculation
    )

    assert tokens == answers.of("expert-wise", "float32")


def test_tensor_parallel(host: Host, moe: Path, fp8: Path, answers: Answers) -> None:
    tokens = ask(host, moe, override("expert-wise", fp8), dtype="float32", tensor_parallel_size=2)

    assert tokens == answers.of("expert-wise", "float32")
