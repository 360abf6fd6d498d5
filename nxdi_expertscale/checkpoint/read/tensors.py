"""The weights of a checkpoint, each with its place in the model and its scale."""

from __future__ import annotations

from dataclasses import dataclass

from nxdi_expertscale.checkpoint.read.files import WeightFiles
from nxdi_expertscale.checkpoint.read.scales import (
    BLOCK_SCALE_SUFFIX,
    SCALE_SUFFIX,
    BlockScale,
    Scheme,
    block_scale,
    find_scales,
)
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.errors import CheckpointError, damaged, incomplete
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.tensor_names import ExpertTensor

FLOATS = ("BF16", "F16", "F32")
"""Dtypes of weights that hold their values as they are."""

FP8 = "F8_E4M3"
"""The dtype of a quantized weight."""

MAX_COLUMNS = 1 << 22
"""More inputs than any linear layer has; a row is read as a whole, so it bounds memory."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a checkpoint that is not the scale of another.

    Attributes:
        tensor: Where it is stored, and its dtype and shape.
        expert: Its place, if it is an expert's.
        is_linear: Whether it is the weight of a linear layer, experts and routers included.
        scale: Its scale, if it is quantized.
    """

    tensor: StoredTensor
    expert: ExpertTensor | None
    is_linear: bool
    scale: BlockScale | None = None

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""
        return self.tensor.name

    @property
    def module(self) -> str:
        """Path of the module that it belongs to."""
        return module_of(self.tensor.name)


def module_of(name: str) -> str:
    """Path of the module that a tensor belongs to, from its name."""
    return name.rpartition(".")[0]


def read_weights(
    files: WeightFiles, family: MoEFamily, scheme: Scheme | None
) -> tuple[Weight, ...]:
    """Find each weight's scale, and check that its values can be read.

    Args:
        files: The checkpoint's files.
        family: The names in it.
        scheme: How it is quantized.

    Returns:
        The weights in the order of the files. Scales are not among them.

    Raises:
        CheckpointError: A weight has a dtype that is not supported, or no scale, or one of a
            wrong shape; a scale has no weight; activations have static scales.
    """
    scales = find_scales(files)
    names_of_scales = {scale.name for scale in scales.values()}
    return tuple(
        _read_weight(files, family, tensor, scales.get(name), scheme)
        for name, tensor in files.tensors.items()
        if name not in names_of_scales
    )


def _read_weight(
    files: WeightFiles,
    family: MoEFamily,
    tensor: StoredTensor,
    scale: StoredTensor | None,
    scheme: Scheme | None,
) -> Weight:
    expert = family.names.parse_expert_key(tensor.name)
    is_linear = _is_linear(tensor, family)
    where = files.location(tensor)
    if 0 in tensor.shape or tensor.columns > MAX_COLUMNS:
        raise damaged(where, f"has shape {list(tensor.shape)}, which no weight has")
    if tensor.dtype != FP8:
        if scale is not None:
            raise CheckpointError(
                f"{where}: has scales and is {tensor.dtype}; of quantized weights only {FP8} can "
                "be read, use the original checkpoint"
            )
        is_parameter = tensor.name.endswith(("weight", "bias"))
        if tensor.dtype not in FLOATS and (is_parameter or tensor.dtype == "F64"):
            raise CheckpointError(
                f"{where}: is {tensor.dtype}; a weight has to be {', '.join(FLOATS)} or {FP8}, "
                "use the original checkpoint"
            )
        return Weight(tensor, expert, is_linear)
    if scale is None:
        raise incomplete(
            where, f"is {FP8} and has no scale ({SCALE_SUFFIX} or {BLOCK_SCALE_SUFFIX})"
        )
    if len(tensor.shape) != 2 or scale.dtype not in FLOATS:
        raise CheckpointError(
            f"{where}: a quantized weight has two dimensions and float scales, not "
            f"{list(tensor.shape)} and {scale.dtype}; use the original checkpoint"
        )
    return Weight(tensor, expert, is_linear, block_scale(files, tensor, scale, scheme))


def _is_linear(tensor: StoredTensor, family: MoEFamily) -> bool:
    module, _, kind = tensor.name.rpartition(".")
    return (
        kind == "weight"
        and len(tensor.shape) == 2
        and module not in family.paths(family.embeddings)
    )
