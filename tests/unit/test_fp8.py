import pytest
import torch

from nxdi_expertscale.numerics import fp8


def byte(value: int) -> torch.Tensor:
    return torch.tensor([0, value], dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("sign", [0x00, 0x80])
def test_a_magnitude_beyond_240_exceeds_the_range(sign: int) -> None:
    assert byte(sign | 0x77).float()[1].abs() == fp8.E4M3_MAX
    assert not any(fp8.exceeds_range(byte(sign | magnitude)) for magnitude in range(0x78))
    assert all(fp8.exceeds_range(byte(sign | magnitude)) for magnitude in range(0x78, 0x80))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_weight_stays_within_neurons_range_and_near_the_original(
    dtype: torch.dtype,
) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).to(dtype)

    quantized, scale = fp8.quantize_per_channel(weight)

    assert (quantized.dtype, quantized.shape) == (torch.float8_e4m3fn, weight.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (48, 1))
    assert not fp8.exceeds_range(quantized)
    assert quantized.float().abs().amax(dim=1).eq(fp8.E4M3_MAX).all()
    error = (fp8.dequantize(quantized, scale) - weight.float()).norm() / weight.float().norm()
    assert error < 0.04


def test_each_channel_has_a_scale_of_its_own() -> None:
    weight = torch.tensor([[240.0, -24.0], [0.24, 0.0], [0.0, 0.0]])

    _, scale = fp8.quantize_per_channel(weight)

    torch.testing.assert_close(scale, torch.tensor([[1.0], [0.001], [fp8.MIN_SCALE]]))


def test_several_experts_at_once_give_what_each_gives_alone() -> None:
    weight = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1))

    quantized, scale = fp8.quantize_per_channel(weight)

    for expert in range(3):
        alone, alone_scale = fp8.quantize_per_channel(weight[expert])
        assert torch.equal(quantized[expert].view(torch.uint8), alone.view(torch.uint8))
        assert torch.equal(scale[expert], alone_scale)


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 240.0, 3e38])
def test_no_quotient_is_cast_to_more_than_240(magnitude: float) -> None:
    weight = torch.rand(64, 257, generator=torch.Generator().manual_seed(2)) * magnitude

    quantized, scale = fp8.quantize_per_channel(weight)

    clamped = (weight / scale).clamp(-fp8.E4M3_MAX, fp8.E4M3_MAX).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.view(torch.uint8), clamped.view(torch.uint8))


def test_buffers_that_are_given_change_nothing() -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
    expected, expected_scale = fp8.quantize_per_channel(weight)
    work, out = weight.clone(), torch.zeros(16, 24, dtype=torch.float8_e4m3fn)

    quantized, scale = fp8.quantize_per_channel(work, scratch=work, out=out)

    assert quantized.data_ptr() == out.data_ptr()
    assert torch.equal(quantized.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_channel_with_a_value_that_is_no_number_has_no_finite_scale(bad: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = bad

    _, scale = fp8.quantize_per_channel(weight)

    assert torch.isfinite(scale).flatten().tolist() == [True, False, True]


def test_every_byte_is_decoded_as_torch_decodes_it() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)

    decoded = fp8.decode(every, out=torch.empty(256))

    torch.testing.assert_close(decoded, every.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(decoded.signbit(), every.float().signbit() & ~decoded.isnan())


@pytest.mark.parametrize("columns", [3, 4, 8, 10])
def test_scales_of_blocks_hold_to_the_edge(columns: int) -> None:
    scale = torch.tensor([[2.0, 3.0, 5.0], [7.0, 11.0, 13.0]])[:, : -(-columns // 4)]

    found = fp8.scale_blocks_(torch.ones(2, columns), scale, 4)

    assert torch.equal(found, scale.repeat_interleave(4, dim=1)[:, :columns])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_those_of_the_weight_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(5)).to(dtype)

    quantized, scale = fp8.quantize_per_channel(weight)

    expected, expected_scale = fp8.quantize_per_channel(weight.float())
    assert torch.equal(quantized.view(torch.uint8), expected.view(torch.uint8))
    assert scale.dtype == torch.float32
    assert torch.equal(scale, expected_scale)
    assert torch.equal(fp8.scale_per_channel(weight), expected_scale)


def test_scratch_that_is_given_is_worked_in() -> None:
    scratch = torch.zeros(4, 6)

    quantized, _ = fp8.quantize_per_channel(torch.ones(4, 6), scratch=scratch)

    assert torch.allclose(scratch, torch.full((4, 6), 240.0))
    assert torch.equal(quantized.float(), torch.full((4, 6), 240.0))


def test_dequantized_values_are_float32_whatever_the_scale_is() -> None:
    values = fp8.dequantize(byte(0x38)[1:], torch.tensor([0.5], dtype=torch.float64))

    assert (values.dtype, values.item()) == (torch.float32, 0.5)


def test_range_of_one_value_and_of_none() -> None:
    assert fp8.exceeds_range(byte(0x7E)[1:])
    assert not fp8.exceeds_range(byte(0x77)[1:])
    assert not fp8.exceeds_range(torch.empty(0, dtype=torch.float8_e4m3fn))


def test_halving_loses_nothing_but_the_last_bit_of_the_smallest() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values, halved = every.float(), fp8.halve(every).float()

    known = ~values.isnan()
    exact = known & (values.abs() >= 2**-5)
    assert torch.equal(halved[exact] * 2, values[exact])
    assert torch.equal(halved.isnan(), ~known)
    assert float((halved[known] * 2 - values[known]).abs().max()) == 2**-9
    assert not fp8.exceeds_range(fp8.halve(every[known]))
    assert torch.equal(fp8.halve(every)[known].float(), (values[known] / 2).to(every.dtype).float())


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_dequantized_values_are_those_of_torchs_own_cast(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = (torch.randn(shape) * 40).to(dtype)
    scale = torch.rand(*shape[:-1], 1) + 0.1

    found = fp8.dequantize(weight, scale)

    assert torch.equal(found, weight.to(torch.float32) * scale)
    transposed = fp8.dequantize(weight.transpose(-1, -2), scale.transpose(-1, -2))
    assert torch.equal(transposed, found.transpose(-1, -2))
    assert torch.equal(fp8.dequantize(weight, torch.tensor(2.0)), weight.to(torch.float32) * 2)
