"""The kinds of quantization, and the dictionaries that describe one."""

from __future__ import annotations

import enum
from typing import Any

import torch


class _Containing(enum.EnumMeta):
    """An enumeration that values can be looked up in with ``in``."""

    def __contains__(cls, item: object) -> bool:
        try:
            cls(item)
        except ValueError:
            return False
        return True


class QuantizationType(enum.Enum, metaclass=_Containing):
    PER_TENSOR_SYMMETRIC = "per_tensor_symmetric"
    PER_CHANNEL_SYMMETRIC = "per_channel_symmetric"
    BLOCKWISE_SYMMETRIC = "blockwise_symmetric"
    PER_KEY_SYMMETRIC = "per_key_symmetric"
    EXPERT_WISE_PER_CHANNEL_SYMMETRIC = "expert_wise_per_channel_symmetric"


class ActivationQuantizationType(enum.Enum, metaclass=_Containing):
    DYNAMIC = "dynamic"
    STATIC = "static"
    NONE = None


class QuantizedDtype(enum.Enum, metaclass=_Containing):
    INT8 = torch.int8
    F8E4M3 = torch.float8_e4m3fn
    F8E4M3FN = torch.float8_e4m3fn
    F8E5M2 = torch.float8_e5m2
    # Four values in one number.
    F8E4M3FN_X4 = torch.uint32
    F8E5M2_X4 = torch.uint32
    F4E2M1FN_X4 = torch.uint16

    @classmethod
    def has_dtype(cls, name: str) -> None:
        assert name.upper() in cls.__members__, f"{name} is not a valid QuantizedDtype."

    @classmethod
    def get_dtype(cls, dtype_string: str) -> torch.dtype:
        cls.has_dtype(dtype_string)
        return cls[dtype_string.upper()].value


def _description(kind: QuantizationType, dtype: QuantizedDtype, **further: Any) -> dict[str, Any]:
    return {
        "quantization_type": kind,
        "quantized_dtype": dtype,
        "activation_quantization_type": ActivationQuantizationType.NONE,
        "clamp_bound": float("inf"),
        **further,
    }


def get_default_custom_qconfig_dict() -> dict[str, Any]:
    return _description(QuantizationType.PER_TENSOR_SYMMETRIC, QuantizedDtype.INT8)


def get_default_per_channel_custom_qconfig_dict() -> dict[str, Any]:
    return _description(
        QuantizationType.PER_CHANNEL_SYMMETRIC,
        QuantizedDtype.INT8,
        quantization_per_channel_axis=None,
    )


def get_default_expert_wise_per_channel_custom_qconfig_dict() -> dict[str, Any]:
    return _description(
        QuantizationType.EXPERT_WISE_PER_CHANNEL_SYMMETRIC,
        QuantizedDtype.F8E4M3,
        quantization_per_channel_axis=None,
    )
