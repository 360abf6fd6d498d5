"""A checkpoint's tensors without their values: what its headers say, as torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nxdi_expertscale.checkpoint.read.files import INDEX, SINGLE_FILE, read_weight_files
from nxdi_expertscale.sources.folder import open_folder

_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
"""torch's dtypes by the format's names; bytes for the one that torch 2.5 does not have."""


def has_headers(folder: Path) -> bool:
    """Whether a folder holds a checkpoint whose files begin with headers (safetensors)."""
    return any((folder / name).is_file() for name in (SINGLE_FILE, INDEX))


def read_without_values(folder: Path) -> dict[str, torch.Tensor]:
    """Read the headers of a checkpoint.

    Args:
        folder: A folder that :func:`has_headers`.

    Returns:
        Every tensor by its name, on the device ``meta``.

    Raises:
        CheckpointError: A file is missing, truncated or garbage.
    """
    return {
        name: torch.empty(stored.shape, dtype=_DTYPES[stored.dtype], device="meta")
        for name, stored in read_weight_files(open_folder(folder)).tensors.items()
    }
