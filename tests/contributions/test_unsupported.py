"""What is said of contributions that cannot have a scale per expert is so in their code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.contributions import running, unsupported
from tests.contributions.contribution import RELEASES
from tests.contributions.test_contributions import prepare
from tests.harness import processes, targets

by_model = pytest.mark.parametrize("model_type", unsupported.CONTRIBUTED)


def file_of(model_type: str) -> Path:
    place = unsupported.place_of(unsupported.CONTRIBUTED[model_type])
    sources = running.sources()
    if sources is None or not (sources / model_type).is_dir():
        pytest.skip(f"{running.VARIABLE} names no folder with {model_type}")
    return sources / model_type / place.file


@by_model
def test_the_line_that_decides_is_there(model_type: str) -> None:
    assert unsupported.CONTRIBUTED[model_type].line in file_of(model_type).read_text("utf-8")


@by_model
@pytest.mark.parametrize("release", [name for name in RELEASES if name in targets.all_targets()])
def test_converter_loses_fp8_and_its_scales(model_type: str, release: str, tmp_path: Path) -> None:
    convert: Callable[..., dict[str, torch.Tensor]] = unsupported.convert
    target = targets.all_targets()[release]

    converted = processes.run_alone(
        target, prepare, tmp_path, convert, model_type, file_of(model_type)
    )

    down = next(value for name, value in converted.items() if name.endswith("down_proj.weight"))
    assert down.shape == (unsupported.EXPERTS, unsupported.INNER, unsupported.HIDDEN)
    assert down.dtype != torch.float8_e4m3fn
    assert not [name for name in converted if name.endswith("mlp_op.down_proj.scale")]


def test_places_are_read() -> None:
    places = {name: unsupported.place_of(model) for name, model in unsupported.CONTRIBUTED.items()}

    assert places.keys() == unsupported.CONVERTERS.keys()
    assert places["afmoe"] == unsupported.Place(
        "refs/heads/main", "contrib/models/Trinity", "src/modeling_trinity.py"
    )
    assert places["laguna"].ref == "refs/pull/158/head"
