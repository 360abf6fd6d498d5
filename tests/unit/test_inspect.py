from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nxdi_expertscale.checkpoint import inspect_checkpoint, quantize_checkpoint
from nxdi_expertscale.cli import plots
from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from tests.harness import checkpoints


def error_by_hand(values: checkpoints.Tensors, layer: int) -> float:
    """Quantize each expert with its own scale, read all with the mean, without rounding."""
    noise = signal = 0.0
    for projection in ("gate_proj", "up_proj", "down_proj"):
        weights = torch.stack(
            [
                values[f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"].float()
                for expert in range(checkpoints.EXPERTS)
            ]
        )
        scale = weights.abs().amax(-1, keepdim=True) / 240
        noise += float((weights / scale * scale.mean(0) - weights).square().sum())
        signal += float(weights.square().sum())
    return (noise / signal) ** 0.5


def test_the_spread_and_the_error_of_a_shared_scale_are_measured(tmp_path: Path) -> None:
    src = checkpoints.save(tmp_path / "src")

    result = inspect_checkpoint(src)

    assert (result.family, result.scheme, result.made_by) == ("qwen3_moe", None, None)
    assert result.num_experts == checkpoints.EXPERTS
    assert result.dtypes == {"BF16": sum(v.nbytes for v in checkpoints.tensors().values())}
    for number, layer in enumerate(result.layers):
        assert layer.layer == number
        assert 32 < layer.spread < 128  # a factor 4**3 was put between them
        assert layer.shared_scale_error == pytest.approx(
            error_by_hand(checkpoints.tensors(), number), rel=1e-4
        )
        assert list(layer.experts) == sorted(layer.experts)


def test_equal_experts_lose_nothing(tmp_path: Path) -> None:
    values = checkpoints.tensors()
    for name in values:
        if ".mlp.experts." in name:
            first = name.split(".experts.")[0] + ".experts.0." + name.split(".", 6)[6]
            values[name] = values[first].clone()
    checkpoints.save(tmp_path / "src", values)

    for layer in inspect_checkpoint(tmp_path / "src").layers:
        assert layer.spread == 1
        assert layer.shared_scale_error == pytest.approx(0, abs=1e-6)
        assert layer.experts == pytest.approx([1] * checkpoints.EXPERTS)


def test_a_quantized_checkpoint_has_nearly_the_scales_of_its_source(tmp_path: Path) -> None:
    src = checkpoints.save(tmp_path / "src")
    dst = quantize_checkpoint(src, tmp_path / "dst").destination

    before, after = inspect_checkpoint(src), inspect_checkpoint(dst)

    assert after.scheme == "compressed-tensors FP8"
    assert after.made_by is not None
    for one, other in zip(before.layers, after.layers, strict=True):
        assert other.experts == pytest.approx(one.experts, rel=1e-5)


def test_nan_is_refused(tmp_path: Path) -> None:
    values = checkpoints.tensors()
    values["model.layers.0.mlp.experts.0.up_proj.weight"][0, 0] = torch.nan
    checkpoints.save(tmp_path / "src", values)

    with pytest.raises(CheckpointError, match="has NaN"):
        inspect_checkpoint(tmp_path / "src")


class TestHeatMap:
    def test_it_shows_every_layer_and_expert(self, tmp_path: Path) -> None:
        image = pytest.importorskip("matplotlib.image")
        result = inspect_checkpoint(checkpoints.save(tmp_path / "src"))

        plots.save(plots.heat_map(result), tmp_path / "map.png")

        pixels = image.imread(tmp_path / "map.png")[..., :3]
        colours = {tuple(pixel) for pixel in pixels[:: pixels.shape[0] // 50].reshape(-1, 3)}
        assert pixels.shape[1] > 1000
        assert sum(max(colour) - min(colour) > 0.2 for colour in colours) > checkpoints.EXPERTS / 2

    @pytest.mark.parametrize(
        ("file", "message"),
        [("map.doc", r"has to end in \.png"), ("absent/map.png", "is not a folder")],
    )
    def test_file_that_cannot_be_drawn_is_refused(
        self, tmp_path: Path, file: str, message: str
    ) -> None:
        pytest.importorskip("matplotlib")

        with pytest.raises(ConfigurationError, match=message):
            plots.check_file(tmp_path / file)

    def test_without_matplotlib_it_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)

        with pytest.raises(ConfigurationError, match=r"pip install 'nxdi-expertscale\[plot\]'"):
            plots.check_file(tmp_path / "map.png")

    def test_projections_that_cancel_are_drawn_apart(self, tmp_path: Path) -> None:
        values = checkpoints.tensors()
        for name in values:
            if name.endswith(".down_proj.weight"):
                expert = int(name.split(".experts.")[1].split(".")[0])
                values[name] = values[name] / 4.0 ** (2 * expert)
        checkpoints.save(tmp_path / "src", values)
        result = inspect_checkpoint(tmp_path / "src")

        for layer in result.layers:
            assert list(layer.projections) == ["gate_proj", "up_proj", "down_proj"]
            up, down = layer.projections["up_proj"], layer.projections["down_proj"]
            assert list(up) == sorted(up) and list(down) == sorted(down, reverse=True)
        assert list(plots.panels(result.layers)) == [
            "gate_proj: scale over the mean",
            "up_proj: scale over the mean",
            "down_proj: scale over the mean",
        ]
        alike = inspect_checkpoint(checkpoints.save(tmp_path / "alike"))
        assert list(plots.panels(alike.layers)) == ["scale of each expert over its layer's mean"]

    @pytest.mark.parametrize(
        ("extreme", "ticks"),
        [
            (1.25, [1 / 1.25, 1 / 1.1, 1, 1.1, 1.25]),
            (1.9, [1 / 1.5, 1 / 1.25, 1 / 1.1, 1, 1.1, 1.25, 1.5]),
            (6.0, [1 / 4, 1 / 2, 1, 2, 4]),
            (2.0**10, [2**-9, 2**-6, 2**-3, 1, 8, 64, 512]),
        ],
    )
    def test_ticks_of_the_colour_bar_are_round(self, extreme: float, ticks: list[float]) -> None:
        assert plots.round_ticks(extreme) == pytest.approx(ticks)
