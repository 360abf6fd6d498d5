"""The arithmetic of scales: one form, fused, averaged, padded, compared."""

from __future__ import annotations

import pytest
import torch

from nxdi_expertscale.numerics import scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 1), (3,)])
def test_a_scale_for_each_channel_is_brought_to_one_form(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=dtype).reshape(shape)

    found = scales.channel_scale(scale, 3)

    assert (found.dtype, found.tolist()) == (torch.float32, [[0.5, 1.0, 2.0]])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_holds_for_every_channel(shape: tuple[int, ...]) -> None:
    found = scales.channel_scale(torch.full(shape, 0.5, dtype=torch.bfloat16), 3)

    assert (found.dtype, found.tolist()) == (torch.float32, [[0.5, 0.5, 0.5]])


def test_weight_with_one_channel_has_one_scale() -> None:
    assert scales.channel_scale(torch.tensor([[0.5]]), 1).tolist() == [[0.5]]


@pytest.mark.parametrize("shape", [(4,), (1, 3), (3, 2), (3, 1, 1), (1, 1, 1), (0,), (2, 1)])
def test_another_shape_is_refused_with_those_that_fit(shape: tuple[int, ...]) -> None:
    message = rf"shape {list(shape)} .* 3 output channels; it must be \[3, 1\], \[3\]".replace(
        "shape [", r"shape \["
    ).replace("] .*", r"\] .*")
    with pytest.raises(ValueError, match=message):
        scales.channel_scale(torch.ones(shape), 3)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_a_dtype_that_holds_no_scale_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"not {dtype}"):
        scales.channel_scale(torch.ones(3).to(dtype), 3)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 0, 2), (2, 0, 1)])
def test_scale_that_is_not_finite_and_positive_is_found(
    bad: float, place: tuple[int, int, int]
) -> None:
    values = torch.ones(3, 1, 4)
    assert scales.are_valid(values)
    values[place] = bad

    assert not scales.are_valid(values)


def test_smallest_positive_scale_is_valid() -> None:
    assert scales.are_valid(torch.full((1, 1, 1), torch.finfo(torch.float32).tiny))
    assert scales.are_valid(torch.ones(0))


def test_gate_then_up_are_fused_along_the_channels_of_each_expert() -> None:
    gate = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    up = torch.tensor([[[5.0, 6.0]], [[7.0, 8.0]]])

    fused = scales.fuse([gate, up])

    assert fused.tolist() == [[[1, 2, 5, 6]], [[3, 4, 7, 8]]]
    assert fused.is_contiguous()


def test_average_is_the_mean_over_experts() -> None:
    values = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]], [[5.0, 1.0]]])

    assert scales.average(values).tolist() == [[[3.0, 3.0]]]


def test_average_adds_experts_one_after_the_other() -> None:
    # The order of additions shows in the last bits; the seed's is this one.
    values = torch.rand(128, 1, 64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(1, 64)
    for scale in values:
        total = total + scale

    assert torch.equal(scales.average(values), (total / 128).unsqueeze(0))


def test_average_leaves_its_input_alone() -> None:
    values = torch.ones(2, 1, 3)

    scales.average(values)

    assert torch.equal(values, torch.ones(2, 1, 3))


def test_padding_goes_to_the_end_of_each_fused_part() -> None:
    values = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[5.0, 6.0, 7.0, 8.0]]])

    assert scales.pad(values, 8, 2).tolist() == [
        [[1, 2, 0, 0, 3, 4, 0, 0]],
        [[5, 6, 0, 0, 7, 8, 0, 0]],
    ]
    assert scales.pad(values, 5, 1).tolist() == [[[1, 2, 3, 4, 0]], [[5, 6, 7, 8, 0]]]
    assert scales.pad(scales.average(values), 6, 2).tolist() == [[[3, 4, 0, 5, 6, 0]]]
    assert scales.pad(values, 4, 2) is values


@pytest.mark.parametrize(("width", "parts"), [(3, 1), (5, 2), (2, 2), (7, 2)])
def test_width_that_is_no_padding_is_refused(width: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"scales of 4 channels cannot be padded to {width}"):
        scales.pad(torch.ones(2, 1, 4), width, parts)


def test_spread_is_largest_over_smallest_of_each_channel() -> None:
    values = torch.tensor([[[0.5, 4.0, 2.0]], [[2.0, 2.0, 2.0]], [[1.0, 3.0, 2.0]]])

    assert scales.spread(values) == scales.Spread(median=2.0, largest=4.0)
    assert scales.spread(torch.ones(3, 1, 5)) == scales.Spread(median=1.0, largest=1.0)


def test_average_of_one_expert_is_its_own_scale() -> None:
    assert scales.average(torch.tensor([[[0.5, 2.0]]])).tolist() == [[[0.5, 2.0]]]


def test_experts_are_compared_with_their_average_by_the_median_channel() -> None:
    values = torch.tensor([[[1.0, 2.0, 9.0]], [[3.0, 6.0, 9.0]]])

    assert scales.relative_to_average(values).tolist() == [0.5, 1.5]


def test_error_of_the_average_is_weighed_by_energy() -> None:
    values = torch.tensor([[[1.0, 5.0]], [[3.0, 5.0]]])
    energy = torch.tensor([[[4.0, 3.0]], [[9.0, 0.0]]])

    # The average of the first channel is 2: twice the one scale, and two thirds of the other.
    expected = ((4 * 1.0**2 + 9 * (1 / 3) ** 2) / 16) ** 0.5
    assert scales.error_of_average(values, energy) == pytest.approx(expected)
    assert scales.error_of_average(values, torch.zeros(2, 1, 2)) == 0.0
    assert scales.error_of_average(values, energy * 1e-30) == pytest.approx(expected)


def test_scales_without_values_are_not_invalid() -> None:
    assert scales.are_valid(torch.empty(2, 1, 4, device="meta"))
