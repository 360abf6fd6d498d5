"""Every test here runs with each release of vLLM-Neuron that is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import nxdi_expertscale
from tests.harness import targets
from tests.server import served
from tests.server.releases import RELEASES, VLLM_VARIABLE, Release

WAYS = ("expert-wise", "averaged", "unquantized")
"""How the experts are served."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def pytest_configure() -> None:
    if all(release.missing for release in RELEASES):
        missing = sorted({str(path) for release in RELEASES for path in release.missing})
        raise pytest.UsageError(
            f"{targets.UPSTREAM_VARIABLE} and {VLLM_VARIABLE} name no release that can be served "
            f"(tests/server/releases.py says what they hold); missing: {', '.join(missing)}"
        )


@pytest.fixture(scope="session", params=RELEASES, ids=lambda release: release.vllm_neuron)
def release(request: pytest.FixtureRequest) -> Release:
    """What is served with what."""
    found: Release = request.param
    if found.missing:
        pytest.skip(f"needs {', '.join(map(str, found.missing))}")
    return found


@pytest.fixture
def host(release: Release, tmp_path: Path) -> Iterator[Host]:
    """A host with a device, on which the release is installed."""
    yield Host(release, tmp_path)


@dataclass(frozen=True)
class Host:
    """Where servers run.

    Attributes:
        release: What is installed.
        folder: Where they run.
    """

    release: Release
    folder: Path

    def environment(self, **variables: str) -> dict[str, str]:
        """The variables of a process there."""
        return {**self.release.environment(self.folder / "host"), **variables}


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that is served."""
    return served.save_moe(tmp_path_factory.mktemp("models") / "moe")


@pytest.fixture(scope="session")
def fp8(moe: Path) -> Path:
    """Its FP8 checkpoint."""
    folder = moe.parent / "fp8"
    nxdi_expertscale.quantize_checkpoint(moe, folder)
    return folder


@pytest.fixture(scope="session")
def dense_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, quantized, that drafts for it."""
    folder = tmp_path_factory.mktemp("models")
    return served.quantize_dense(served.save_dense(folder / "dense"), folder / "dense_fp8")


class Answers:
    """What Hugging Face answers, computed once.

    Attributes:
        models: The model in full precision that each way stands for.
    """

    def __init__(self, moe: Path, fp8: Path) -> None:
        self.models = {
            "unquantized": moe,
            "expert-wise": served.dequantize(fp8, moe.parent / "dequantized", averaged=False),
            "averaged": served.dequantize(fp8, moe.parent / "averaged", averaged=True),
        }
        self._known: dict[tuple[str, str], list[list[int]]] = {}

    def of(self, way: str, dtype: str) -> list[list[int]]:
        """The tokens for :data:`served.PROMPTS` of the model that a way stands for."""
        key = (way, dtype)
        if key not in self._known:
            self._known[key] = served.answers_of_hugging_face(self.models[way], DTYPES[dtype])
        return self._known[key]

    def allow(self, tokens: list[list[int]], way: str, dtype: str) -> bool:
        """Whether these are the tokens of a way, up to how far the dtype rounds logits."""
        if dtype == "float32":
            return tokens == self.of(way, dtype)
        return served.rounds_to(tokens, self.models[way], DTYPES[dtype])


@pytest.fixture(scope="session")
def answers(moe: Path, fp8: Path) -> Answers:
    """What Hugging Face answers."""
    return Answers(moe, fp8)


def override(way: str, fp8: Path) -> dict[str, Any]:
    """What a user writes as ``override_neuron_config``."""
    if way == "unquantized":
        return {}
    return {
        "quantized": True,
        "quantized_checkpoints_path": str(fp8),
        "quantization_type": "per_channel_symmetric",
        "quantization_dtype": "f8e4m3",
        "expert_wise_scale": way == "expert-wise",
    }
