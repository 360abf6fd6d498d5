"""The weights of a checkpoint, each with its place in the model and its scale."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

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
        can_be_quantized: Whether NxDI can load it quantized, as far as its place says; see
            :func:`read_weights`.
        is_mtp: Whether it is of what predicts further tokens, and not of the model.
    """

    tensor: StoredTensor
    expert: ExpertTensor | None
    is_linear: bool
    scale: BlockScale | None = None
    can_be_quantized: bool = True
    is_mtp: bool = False

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
    files: WeightFiles, family: MoEFamily, scheme: Scheme | None, num_layers: int
) -> tuple[Weight, ...]:
    """Find each weight's scale, and check that its values can be read.

    What NxDI cannot load quantized is told by its place: routers (``nn.Linear``), linear layers
    with a bias (NxD's ``quantization_layers.py`` has none), and what else is in an MoE block, as
    shared experts are (NxD's ``modules/moe/shared_experts.py`` multiplies by their weights as they
    are). What predicts further tokens NxDI does not load at all.

    Args:
        files: The checkpoint's files.
        family: The names in it.
        scheme: How it is quantized.
        num_layers: The model's number of layers.

    Returns:
        The weights in the order of the files. Scales are not among them.

    Raises:
        CheckpointError: A weight has a dtype that is not supported, or no scale, or one of a
            wrong shape; a scale has no weight; activations have static scales.
    """
    scales = find_scales(files)
    names_of_scales = {scale.name for scale in scales.values()}
    with_experts = {
        place.layer for place in map(family.names.parse_expert_key, files.tensors) if place
    }
    weights = []
    for name, tensor in files.tensors.items():
        if name in names_of_scales:
            continue
        weight = _read_weight(files, family, tensor, scales.get(name), scheme)
        if family.names.is_mtp_key(name, num_layers):
            weight = replace(weight, expert=None, can_be_quantized=False, is_mtp=True)
        elif not _can_be_quantized(files, family, weight, with_experts):
            weight = replace(weight, can_be_quantized=False)
        weights.append(weight)
    return tuple(weights)


def _can_be_quantized(
    files: WeightFiles, family: MoEFamily, weight: Weight, with_experts: Collection[int]
) -> bool:
    if not weight.is_linear or weight.expert is not None:
        return weight.is_linear
    if family.names.is_router_key(weight.name) or f"{weight.module}.bias" in files.tensors:
        return False
    place = family.names.parse_block_key(family.renamed(weight.name))
    return place is None or place[0] not in with_experts


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
