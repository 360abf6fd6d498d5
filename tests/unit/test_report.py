"""What the log says of a model that is loaded, and that vLLM shows it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nxdi_expertscale import vllm
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST, FileRecord, Manifest
from nxdi_expertscale.loading.expert_scales import LayerScales
from nxdi_expertscale.loading.report import report_experts

_FILES = (FileRecord("model-00001-of-00001.safetensors", 10, "ab"),)


def manifest(version: str, *shards: FileRecord) -> Manifest:
    return Manifest(
        version=version,
        model_type="qwen3_moe",
        modules_to_not_convert=(),
        below_floor=(),
        source=(),
        tensors={},
        shards=shards,
        files=(),
    )


_MANIFEST = manifest("0.1.0", *_FILES)


def layers(number: int, experts: int) -> list[LayerScales]:
    scale = torch.ones(experts, 1, 4)
    return [
        LayerScales(
            layer=layer, fused={"gate_up_proj": scale}, consumed=(), samples={}, samplers={}
        )
        for layer in range(number)
    ]


@pytest.mark.parametrize(
    ("expert_wise", "scales"),
    [(True, "8 scales per channel, one for each"), (False, "1 scale per channel, the mean of all")],
)
def test_line_says_what_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, expert_wise: bool, scales: str
) -> None:
    (tmp_path / MANIFEST).write_bytes(_MANIFEST.to_json())

    with caplog.at_level(logging.INFO, "nxdi_expertscale"):
        report_experts(layers(2, 8), str(tmp_path), expert_wise=expert_wise)

    (line,) = caplog.messages
    assert f"loaded 2 layers of 8 FP8 experts with {scales}" in line
    assert f"{tmp_path} (digest {_MANIFEST.digest[:16]})" in line


def test_folder_that_nobody_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nxdi_expertscale"):
        report_experts(layers(1, 2), str(tmp_path), expert_wise=True)

    assert f"{tmp_path} (no {MANIFEST}" in caplog.text


def test_dense_model_has_no_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nxdi_expertscale"):
        report_experts([], "folder", expert_wise=True)

    assert not caplog.messages


def test_digest_is_of_the_contents() -> None:
    other = manifest("0.2.0", *_FILES)
    changed = manifest("0.1.0", FileRecord("model", 10, "ac"))

    assert other.digest == _MANIFEST.digest != changed.digest


class Kept(logging.Handler):
    """Keeps the lines that a program shows."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def loggers() -> Iterator[tuple[logging.Logger, logging.Logger]]:
    """vLLM's logger and ours, as they are before a program configures them."""
    both = logging.getLogger("vllm"), logging.getLogger("nxdi_expertscale")
    before = [(one.handlers, one.level, one.propagate) for one in both]
    for one in both:
        one.handlers, one.propagate = [], True
        one.setLevel(logging.NOTSET)
    yield both
    for one, (handlers, level, propagate) in zip(both, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


def test_vllm_shows_our_lines(loggers: tuple[logging.Logger, logging.Logger]) -> None:
    of_vllm, ours = loggers
    kept = Kept()
    of_vllm.addHandler(kept)
    of_vllm.setLevel(logging.INFO)

    vllm.activate()
    vllm.activate()
    ours.info("seen once")

    assert kept.lines.count("seen once") == 1


def test_a_program_that_has_configured_ours_keeps_it(
    loggers: tuple[logging.Logger, logging.Logger],
) -> None:
    of_vllm, ours = loggers
    of_vllm.addHandler(Kept())
    own = Kept()
    ours.addHandler(own)

    vllm.activate()

    assert ours.handlers == [own]
