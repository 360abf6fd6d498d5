import pytest
import torch

from nxdi_expertscale import fp8


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
