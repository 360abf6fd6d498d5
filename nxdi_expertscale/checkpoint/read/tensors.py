"""The tensors of a checkpoint with their scales: how each one's values are to be read.

Read are bfloat16, float16 and float32; Hugging Face's FP8 in blocks (``weight_scale_inv``); and
FP8 with a scale for each channel or tensor, as compressed-tensors writes it (``weight_scale``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nxdi_expertscale.checkpoint.chunks import as_rows
from nxdi_expertscale.checkpoint.read.config import MAX_LAYERS, layers_in, size_in
from nxdi_expertscale.checkpoint.read.files import CONFIG, Checkpoint
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.config_fields import language_config, ties_embeddings
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.tensor_names import ExpertTensor

FLOATS = ("BF16", "F16", "F32")
"""Dtypes of weights that hold their values as they are."""

FP8 = "F8_E4M3"
"""The dtype of a quantized weight."""

SCALE_SUFFIX = "weight_scale"
"""compressed-tensors' name of a scale, which NxDI's ``get_state_dict`` reads too."""

BLOCK_SCALE_SUFFIX = "weight_scale_inv"
"""Hugging Face's name of the scales of a weight in FP8 blocks."""

MAX_COLUMNS = 1 << 22
"""More inputs than any linear layer has; a row is read as a whole, so it bounds memory."""


@dataclass(frozen=True, slots=True)
class BlockScale:
    """The scale of a quantized weight.

    Attributes:
        tensor: It, ``[ceil(out / rows), ceil(in / columns)]`` or of as many elements.
        rows: Rows of the weight that share one of its elements.
        columns: Columns of the weight that share one.
    """

    tensor: StoredTensor
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a checkpoint.

    Attributes:
        tensor: It.
        expert: Its place, if it is an expert's.
        is_linear: Whether it is the weight of a linear layer, experts and routers included.
        scale: Its scale, if it is quantized.
    """

    tensor: StoredTensor
    expert: ExpertTensor | None
    is_linear: bool
    scale: BlockScale | None = None

    @property
    def module(self) -> str:
        """Path of the module that it belongs to."""
        return module_of(self.tensor.name)


def module_of(name: str) -> str:
    """Path of the module that a tensor belongs to, from its name."""
    return name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint is quantized.

    Attributes:
        name: In words, for people.
        block: Rows and columns that share a scale, where Hugging Face's FP8 blocks are used.
    """

    name: str
    block: tuple[int, int] | None = None


def scheme_of(checkpoint: Checkpoint) -> Scheme | None:
    """Read from ``config.json`` how a checkpoint is quantized; None if it is not.

    Raises:
        CheckpointError: In a way that cannot be read.
    """
    settings = checkpoint.config.get("quantization_config")
    if settings is None:
        return None
    where = f"{checkpoint.folder / CONFIG}: quantization_config"
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: is not an object; download the file again")
    method, form = settings.get("quant_method"), settings.get("format")
    if method == "compressed-tensors" and form == "float-quantized":
        return Scheme("compressed-tensors FP8")
    if method == "fp8":
        block = settings.get("weight_block_size")
        if block is None:
            return Scheme("FP8")
        if not _is_block(block):
            raise CheckpointError(
                f"{where}: weight_block_size {block!r} is not two sizes; download the file again"
            )
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


def read_weights(checkpoint: Checkpoint, family: MoEFamily) -> list[Weight]:
    """Find each tensor's scale, and check that its values can be read.

    Scales are no weights of their own and are not in the list. The order is that of the files.

    Raises:
        CheckpointError: A weight has a dtype that is not supported, or no scale, or one of a
            wrong shape; a scale has no weight; activations have static scales.
    """
    scheme = scheme_of(checkpoint)
    scales = dict(_scales(checkpoint))
    names_of_scales = {scale.name for scale in scales.values()}
    return [
        _with_scale(checkpoint, family, tensor, scales.get(name), scheme)
        for name, tensor in checkpoint.tensors.items()
        if name not in names_of_scales
    ]


def _scales(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    """For the name of each quantized weight, its scale."""
    seen: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        where = checkpoint.folder / tensor.file
        if name.endswith(".input_scale"):
            raise CheckpointError(
                f"{where}: {name}: static scales of activations are not supported; use a "
                "checkpoint whose weights alone are quantized"
            )
        suffix = name.rpartition(".")[2]
        if suffix not in (SCALE_SUFFIX, BLOCK_SCALE_SUFFIX):
            continue
        weight = f"{name.removesuffix(suffix)}weight"
        if weight not in checkpoint.tensors:
            raise CheckpointError(
                f"{where}: {name}: its weight {weight} is missing; download the checkpoint again, "
                "completely"
            )
        if weight in seen:
            raise CheckpointError(
                f"{where}: {name}: {weight} has another scale, {seen[weight]}; download the "
                "checkpoint again"
            )
        seen[weight] = name
        yield weight, tensor


def _with_scale(
    checkpoint: Checkpoint,
    family: MoEFamily,
    tensor: StoredTensor,
    scale: StoredTensor | None,
    scheme: Scheme | None,
) -> Weight:
    expert = family.names.parse_expert_key(tensor.name)
    is_linear = _is_linear(tensor, family)
    where = f"{checkpoint.folder / tensor.file}: {tensor.name}"
    if 0 in tensor.shape or as_rows(tensor.shape)[1] > MAX_COLUMNS:
        raise CheckpointError(
            f"{where}: has shape {list(tensor.shape)}, which no weight has; download the file again"
        )
    if tensor.dtype != FP8:
        if scale is not None:
            raise CheckpointError(
                f"{where}: has scales and is {tensor.dtype}; of quantized weights only {FP8} can "
                "be read, use the original checkpoint"
            )
        if (is_linear or expert is not None) and tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: is {tensor.dtype}; a weight has to be {', '.join(FLOATS)} or {FP8}, "
                "use the original checkpoint"
            )
        return Weight(tensor, expert, is_linear)
    if scale is None:
        raise CheckpointError(
            f"{where}: is {FP8} and has no scale ({SCALE_SUFFIX} or {BLOCK_SCALE_SUFFIX}); "
            "download the checkpoint again, completely"
        )
    if not is_linear or scale.dtype not in FLOATS:
        raise CheckpointError(
            f"{where}: a quantized weight has two dimensions and float scales, not "
            f"{list(tensor.shape)} and {scale.dtype}; use the original checkpoint"
        )
    rows, columns = _block_of(where, tensor, scale, scheme)
    return Weight(tensor, expert, is_linear, BlockScale(scale, rows, columns))


def _is_linear(tensor: StoredTensor, family: MoEFamily) -> bool:
    module, _, kind = tensor.name.rpartition(".")
    return (
        kind == "weight"
        and len(tensor.shape) == 2
        and module not in family.paths(family.embeddings)
    )


def _block_of(
    where: str, tensor: StoredTensor, scale: StoredTensor, scheme: Scheme | None
) -> tuple[int, int]:
    rows, columns = tensor.shape
    in_blocks = scale.name.endswith(BLOCK_SCALE_SUFFIX) and scheme is not None
    if in_blocks and scheme is not None and scheme.block is not None:
        block = scheme.block
        allowed: set[tuple[int, ...]] = {(-(-rows // block[0]), -(-columns // block[1]))}
    elif scale.shape in ((), (1,), (1, 1)):
        return rows, columns
    else:
        block = (1, columns)
        allowed = {(rows, 1), (rows,)}
    if scale.shape not in allowed:
        raise CheckpointError(
            f"{where}: its scale {scale.name} has shape {list(scale.shape)}, and has to have "
            f"{' or '.join(str(list(shape)) for shape in sorted(allowed))}; download the "
            "checkpoint again"
        )
    return block


def check_architecture(checkpoint: Checkpoint, family: MoEFamily) -> None:
    """Check that all experts are there and that shapes are those that the config says.

    Raises:
        CheckpointError: They are not; the message names the first tensor.
    """
    config, where = language_config(checkpoint.config), checkpoint.folder / CONFIG
    layers = layers_in(config, where)
    hidden = size_in(config, "hidden_size", where)
    vocabulary = size_in(config, "vocab_size", where)
    experts, inner = family.experts_of(config), family.intermediate_size_of(config)
    if experts is None or inner is None or not 0 < experts <= MAX_LAYERS or inner < 1:
        raise CheckpointError(
            f"{where}: does not say how many experts a layer has and how wide they are; "
            "download it again"
        )
    found: dict[int, set[tuple[int, str]]] = defaultdict(set)
    for name, tensor in checkpoint.tensors.items():
        place = family.names.parse_expert_key(name)
        if place is not None and place.suffix == "weight":
            found[place.layer].add((place.expert, place.projection))
            shape = (hidden, inner) if place.projection == family.down else (inner, hidden)
            _expect_shape(checkpoint, tensor, shape)
    _expect_tensor(checkpoint, family, f"{family.embeddings}.weight", (vocabulary, hidden))
    if not ties_embeddings(checkpoint.config):
        _expect_tensor(checkpoint, family, f"{family.head}.weight", (vocabulary, hidden))
    for layer in range(layers):
        if found[layer] or not _is_dense(checkpoint, family, layer):
            _expect_experts(checkpoint, family, layer, found[layer], experts)
            _expect_tensor(checkpoint, family, family.router_key(layer), (experts, hidden))
    beyond = [layer for layer in found if layer >= layers]
    if beyond:
        raise CheckpointError(
            f"{checkpoint.folder}: has experts of layer {min(beyond)}, and {CONFIG} says "
            f"{layers} layers; one of them is another model's"
        )


def _expect_experts(
    checkpoint: Checkpoint,
    family: MoEFamily,
    layer: int,
    found: set[tuple[int, str]],
    experts: int,
) -> None:
    extra = [place for place in found if place[0] >= experts]
    if extra:
        raise CheckpointError(
            f"{checkpoint.folder}: {family.expert_key(layer, *min(extra))}: is there, and "
            f"{CONFIG} says {experts} experts; one of them is another model's"
        )
    count = experts * len(family.projections)
    if len(found) < count:
        missing = next(
            (expert, projection)
            for expert in range(experts)
            for projection in family.projections
            if (expert, projection) not in found
        )
        raise CheckpointError(
            f"{checkpoint.folder}: {family.expert_key(layer, *missing)}: is missing, one of "
            f"{count - len(found)} of {count} in layer {layer}; download the checkpoint again, "
            "completely"
        )


def _is_dense(checkpoint: Checkpoint, family: MoEFamily, layer: int) -> bool:
    """Whether a layer has a plain feed-forward part where others have experts."""
    block = module_of(family.router_key(layer)).rpartition(".")[0]
    return any(
        path in checkpoint.tensors
        for projection in family.projections
        for path in family.paths(f"{block}.{projection}.weight")
    )


def _expect_tensor(
    checkpoint: Checkpoint, family: MoEFamily, name: str, shape: tuple[int, int]
) -> None:
    found = (checkpoint.tensors.get(path) for path in family.paths(name))
    tensor = next((tensor for tensor in found if tensor is not None), None)
    if tensor is None:
        raise CheckpointError(
            f"{checkpoint.folder}: {name}: is missing; download the checkpoint again, completely"
        )
    _expect_shape(checkpoint, tensor, shape)


def _expect_shape(checkpoint: Checkpoint, tensor: StoredTensor, shape: tuple[int, int]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{checkpoint.folder / tensor.file}: {tensor.name}: has shape {list(tensor.shape)}, "
            f"and {CONFIG} says {list(shape)}; one of them is another model's"
        )
