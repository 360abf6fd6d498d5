"""How a checkpoint is quantized, and which scales belong to which weight.

Read are Hugging Face's FP8 in blocks (``weight_scale_inv``), and FP8 with a scale for each channel
or tensor, as compressed-tensors writes it (``weight_scale``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nxdi_expertscale.checkpoint.read.config import ModelConfig
from nxdi_expertscale.checkpoint.read.files import WeightFiles
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.errors import CheckpointError, damaged, incomplete

SCALE_SUFFIX = "weight_scale"
"""compressed-tensors' name of a scale, which NxDI's ``get_state_dict`` reads too."""

BLOCK_SCALE_SUFFIX = "weight_scale_inv"
"""Hugging Face's name of the scales of a weight in FP8 blocks."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint is quantized.

    Attributes:
        name: What tables call it.
        block: Rows and columns that share a scale, where Hugging Face's FP8 blocks are used.
    """

    name: str
    block: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class BlockScale:
    """The scale of a quantized weight ``[out, in]``.

    Attributes:
        tensor: The stored scale, ``[ceil(out / rows), ceil(in / columns)]`` or of as many elements.
        rows: Rows of the weight that share one of its elements.
        columns: Columns of the weight that share one.
    """

    tensor: StoredTensor
    rows: int
    columns: int


def read_scheme(config: ModelConfig) -> Scheme | None:
    """Read from a config how a checkpoint is quantized; None if it is not.

    Raises:
        CheckpointError: It is quantized in a way that cannot be read.
    """
    settings = config.quantization_config
    if settings is None:
        return None
    where = f"{config.where}: quantization_config"
    method, form = settings.get("quant_method"), settings.get("format")
    if method == "compressed-tensors" and form == "float-quantized":
        return Scheme("compressed-tensors FP8")
    if method == "fp8":
        block = settings.get("weight_block_size")
        if block is None:
            return Scheme("FP8")
        if not _is_block(block):
            raise damaged(where, f"weight_block_size {block!r} is not two sizes")
        return Scheme(f"FP8 in blocks of {block[0]} by {block[1]}", (block[0], block[1]))
    raise CheckpointError(
        f"{where}: weights quantized as {form if method == 'compressed-tensors' else method!r} "
        "cannot be read; use the original checkpoint in bfloat16, float16 or float32, or one in "
        "FP8 (fp8 blocks, or compressed-tensors float-quantized)"
    )


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and 0 < size < 1 << 31 for size in block)
    )


def find_scales(files: WeightFiles) -> dict[str, StoredTensor]:
    """Find the scale of each quantized weight, by the weight's name.

    Raises:
        CheckpointError: A scale has no weight, or a weight has two; activations have static
            scales.
    """
    found: dict[str, StoredTensor] = {}
    for weight, scale in _named_scales(files):
        if weight not in files.tensors:
            raise incomplete(files.location(scale), f"its weight {weight} is missing")
        if weight in found:
            raise damaged(
                files.location(scale), f"{weight} has another scale, {found[weight].name}"
            )
        found[weight] = scale
    return found


def _named_scales(files: WeightFiles) -> Iterator[tuple[str, StoredTensor]]:
    """The name of its weight for each scale."""
    for name, tensor in files.tensors.items():
        suffix = name.rpartition(".")[2]
        if name.endswith(".input_scale"):
            raise CheckpointError(
                f"{files.location(tensor)}: static scales of activations are not supported; use a "
                "checkpoint whose weights alone are quantized"
            )
        if suffix in (SCALE_SUFFIX, BLOCK_SCALE_SUFFIX):
            yield f"{name.removesuffix(suffix)}weight", tensor


def block_scale(
    files: WeightFiles, weight: StoredTensor, scale: StoredTensor, scheme: Scheme | None
) -> BlockScale:
    """The scale of a weight ``[out, in]``, with the block that each of its elements holds for.

    Raises:
        CheckpointError: The scale has a shape that does not fit the weight.
    """
    rows, columns = weight.shape
    block = scheme.block if scheme is not None else None
    if block is not None and scale.name.endswith(BLOCK_SCALE_SUFFIX):
        allowed: set[tuple[int, ...]] = {(-(-rows // block[0]), -(-columns // block[1]))}
    elif scale.shape in ((), (1,), (1, 1)):
        return BlockScale(scale, rows, columns)
    else:
        block = (1, columns)
        allowed = {(rows, 1), (rows,)}
    if scale.shape not in allowed:
        raise damaged(
            files.location(weight),
            f"its scale {scale.name} has shape {list(scale.shape)}, and has to have "
            f"{' or '.join(str(list(shape)) for shape in sorted(allowed))}",
        )
    return BlockScale(scale, *block)
