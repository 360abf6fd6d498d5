"""Transposed copies: torch's own bits, for every dtype and shape."""

from __future__ import annotations

import pytest
import torch

from nxdi_expertscale.numerics import transpose
from nxdi_expertscale.numerics.transpose import copy_transposed

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bfloat16, torch.float16)


def weight_of(dtype: torch.dtype, out: int, inputs: int) -> torch.Tensor:
    """Every byte there is, NaN among them."""
    count = out * inputs * dtype.itemsize
    return (torch.arange(count) * 37 % 251).to(torch.uint8).view(dtype).view(out, inputs)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 8), (72, 96), (7, 12), (5, 7), (1, 4), (3, 1), (0, 4)])
def test_copy_has_the_bits_of_torchs_copy(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = weight_of(dtype, *shape)
    out = torch.zeros(shape[1], shape[0], dtype=dtype)

    copy_transposed(weight, out)

    assert torch.equal(bits(out), bits(weight.T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_in_several_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transpose, "SCRATCH_BYTES", 100)
    weight = weight_of(dtype, 23, 16)
    out = torch.zeros(16, 23, dtype=dtype)

    copy_transposed(weight, out)

    assert torch.equal(bits(out), bits(weight.T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_leaves_what_is_beside_it(dtype: torch.dtype) -> None:
    weight = weight_of(dtype, 6, 8)
    fused = torch.zeros(8, 12, dtype=dtype)

    copy_transposed(weight, fused[:, 3:9])

    assert torch.equal(bits(fused[:, 3:9]), bits(weight.T))
    assert not bits(torch.cat([fused[:, :3], fused[:, 9:]], dim=1)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_may_be_a_part_of_a_tensor(dtype: torch.dtype) -> None:
    tensor = weight_of(dtype, 9, 9)
    odd = tensor.flatten()[1:33].view(4, 8)
    for weight in (tensor[:, :8], tensor[1:5], tensor.T, odd):
        out = torch.zeros(*reversed(weight.shape), dtype=dtype)

        copy_transposed(weight, out)

        assert torch.equal(bits(out), bits(weight.T))


def test_copy_converts_as_torch_does() -> None:
    weight = torch.randn(4, 8)
    out = torch.zeros(8, 4, dtype=torch.bfloat16)

    copy_transposed(weight, out)

    assert torch.equal(out, weight.T.to(torch.bfloat16))
