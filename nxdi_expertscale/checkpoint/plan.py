"""What becomes of each tensor of a checkpoint: decided from names and shapes alone.

Nothing is read but headers and nothing is written, so whatever can be refused is refused here.
"""

from __future__ import annotations

import enum
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nxdi_expertscale.checkpoint.source import CONFIG, Checkpoint
from nxdi_expertscale.checkpoint.tensor_file import NewTensor, StoredTensor, lay_out
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families import MoEFamily

FLOATS = ("BF16", "F16", "F32")
"""Dtypes of weights that hold their values as they are."""

FP8 = "F8_E4M3"
"""The dtype of a quantized weight, in a source and in the output."""

SCALE_SUFFIX = "weight_scale"
"""compressed-tensors' name of a scale, which NxDI's ``get_state_dict`` reads too."""

BLOCK_SCALE_SUFFIX = "weight_scale_inv"
"""Hugging Face's name of the scales of a weight in FP8 blocks."""

LM_HEAD = "lm_head"

_HF_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Treatment(enum.Enum):
    """What is done with a tensor."""

    QUANTIZE = "quantized"
    DEQUANTIZE = "dequantized"
    KEEP = "kept"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the source and what becomes of it.

    Attributes:
        source: The tensor.
        treatment: What is done with it.
        is_expert: Whether it is a weight of an expert.
        scale: The source's scale of it, if it is quantized there.
        block: Rows and columns that share one scale there, if it is quantized in blocks.
        dtype: The dtype that it gets.
    """

    source: StoredTensor
    treatment: Treatment
    is_expert: bool
    dtype: str
    scale: StoredTensor | None = None
    block: tuple[int, int] | None = None

    @property
    def scale_name(self) -> str:
        """Name of the scale that it gets when it is quantized."""
        return f"{_module(self.source.name)}.{SCALE_SUFFIX}"

    @property
    def outputs(self) -> Iterator[NewTensor]:
        """The tensors that are written for it."""
        yield NewTensor(self.source.name, self.dtype, self.source.shape)
        if self.treatment is Treatment.QUANTIZE:
            yield NewTensor(self.scale_name, "F32", (self.source.shape[0], 1))


@dataclass(frozen=True)
class ShardPlan:
    """A file to be written.

    Attributes:
        name: Its name.
        header: Its bytes before the data.
        offsets: Where each tensor's bytes start, by name, from the start of the file.
        nbytes: Its size.
        tensors: The tensors of the source that it is made from.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int
    tensors: tuple[PlannedTensor, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that a run will write.

    Attributes:
        shards: The files of weights.
        index: What the index will hold.
        config: What ``config.json`` will hold.
        exclusions: Names of the modules that stay as they are, as asked for and as needed.
        unused_exclusions: Those that no module of the checkpoint has in its path.
    """

    shards: tuple[ShardPlan, ...]
    index: Mapping[str, Any]
    config: Mapping[str, Any]
    exclusions: tuple[str, ...]
    unused_exclusions: tuple[str, ...]

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        """Every tensor of the source, with what becomes of it."""
        for shard in self.shards:
            yield from shard.tensors


def make_plan(
    checkpoint: Checkpoint,
    family: MoEFamily,
    modules_to_not_convert: Sequence[str],
    max_shard_bytes: int,
) -> Plan:
    """Decide what becomes of each tensor, and in which file it goes.

    What is quantized is what NxDI's own step quantizes (``application_base.py``,
    ``generate_quantized_state_dict``: every linear layer, ``lm_head`` too), except the router.

    Args:
        checkpoint: The source.
        family: Its family.
        modules_to_not_convert: Modules that stay as they are; see :meth:`MoEFamily.excludes`.
        max_shard_bytes: Size at which a new file is begun.

    Raises:
        CheckpointError: The checkpoint is quantized in a way that cannot be read, or lacks
            experts, or has shapes that disagree with its config.
        ConfigurationError: An exclusion names a part of a fused weight.
    """
    exclusions = _effective_exclusions(checkpoint, modules_to_not_convert)
    tensors = list(_plan_tensors(checkpoint, family, exclusions))
    check_architecture(checkpoint, family)
    shards = tuple(_plan_shards(tensors, max_shard_bytes))
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    total = sum(new.nbytes for tensor in tensors for new in tensor.outputs)
    return Plan(
        shards=shards,
        index={"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        config=_output_config(checkpoint.config, family, tensors),
        exclusions=exclusions,
        unused_exclusions=tuple(_unused(exclusions, family, checkpoint)),
    )


def _effective_exclusions(checkpoint: Checkpoint, asked: Sequence[str]) -> tuple[str, ...]:
    exclusions = tuple(dict.fromkeys(asked))
    # With tied embeddings there is one table for both, and a table has no scales.
    if checkpoint.config.get("tie_word_embeddings") is True and LM_HEAD not in exclusions:
        exclusions += (LM_HEAD,)
    return exclusions


def _unused(exclusions: Iterable[str], family: MoEFamily, checkpoint: Checkpoint) -> Iterator[str]:
    modules = {_module(name) for name in checkpoint.tensors}
    for exclusion in exclusions:
        if exclusion != LM_HEAD and not any(
            family.excludes(module, [exclusion]) for module in modules
        ):
            yield exclusion


def _plan_tensors(
    checkpoint: Checkpoint, family: MoEFamily, exclusions: Sequence[str]
) -> Iterator[PlannedTensor]:
    scheme = source_scheme(checkpoint)
    scales = {
        f"{_module(name)}.weight": tensor
        for name, tensor in checkpoint.tensors.items()
        if name.endswith((f".{SCALE_SUFFIX}", f".{BLOCK_SCALE_SUFFIX}"))
    }
    _check_scales_have_weights(checkpoint, scales)
    names_of_scales = {tensor.name for tensor in scales.values()}
    full_dtype = _full_precision(checkpoint.config)
    for name, tensor in checkpoint.tensors.items():
        if name in names_of_scales:
            continue
        scale = scales.get(name)
        where = checkpoint.folder / tensor.file
        is_expert = family.parse_expert_key(name) is not None
        block = _check_weight(where, tensor, scale, scheme, is_expert)
        if not _is_linear(tensor, family):
            converted = False
        else:
            converted = not family.is_router_key(name) and not family.excludes(
                _module(name), exclusions
            )
        if converted:
            treatment, dtype = Treatment.QUANTIZE, FP8
        elif tensor.dtype == FP8:
            treatment, dtype = Treatment.DEQUANTIZE, full_dtype
        else:
            treatment, dtype = Treatment.KEEP, tensor.dtype
        yield PlannedTensor(tensor, treatment, is_expert, dtype, scale, block)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_linear(tensor: StoredTensor, family: MoEFamily) -> bool:
    module, _, kind = tensor.name.rpartition(".")
    return (
        kind == "weight"
        and len(tensor.shape) == 2
        and module.removeprefix("model.") != family.embeddings
    )


@dataclass(frozen=True)
class SourceScheme:
    """How a checkpoint is quantized already.

    Attributes:
        name: In words, for people.
        block: Rows and columns that share a scale, where Hugging Face's FP8 blocks are used.
    """

    name: str
    block: tuple[int, int] | None = None


def source_scheme(checkpoint: Checkpoint) -> SourceScheme | None:
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
    method = settings.get("quant_method")
    if method == "fp8":
        block = settings.get("weight_block_size")
        if block is None:
            return SourceScheme("FP8")
        if not _is_block(block):
            raise CheckpointError(
                f"{where}: weight_block_size {block!r} is not two sizes; download the file again"
            )
        return SourceScheme(f"FP8 in blocks of {block[0]} by {block[1]}", (block[0], block[1]))
    if method == "compressed-tensors" and settings.get("format") == "float-quantized":
        return SourceScheme("compressed-tensors FP8")
    found = f"{method!r}" if method != "compressed-tensors" else f"{settings.get('format')!r}"
    raise CheckpointError(
        f"{where}: weights quantized as {found} cannot be read; use the original checkpoint in "
        "bfloat16, float16 or float32, or one in FP8 (fp8 blocks, compressed-tensors "
        "float-quantized)"
    )


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and 0 < size < 1 << 31 for size in block)
    )


def _check_scales_have_weights(checkpoint: Checkpoint, scales: Mapping[str, StoredTensor]) -> None:
    for weight, scale in scales.items():
        if weight not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.folder / scale.file}: {scale.name}: its weight {weight} is missing; "
                "download the checkpoint again, completely"
            )
    for name, tensor in checkpoint.tensors.items():
        if name.endswith("input_scale"):
            raise CheckpointError(
                f"{checkpoint.folder / tensor.file}: {name}: static scales of activations are not "
                "supported; use a checkpoint whose weights alone are quantized"
            )


def _check_weight(
    where: object,
    tensor: StoredTensor,
    scale: StoredTensor | None,
    scheme: SourceScheme | None,
    is_expert: bool,
) -> tuple[int, int] | None:
    """Check dtype and scale of a tensor; give the rows and columns that share one scale."""
    kind = tensor.name.rpartition(".")[2]
    is_weight = kind == "weight" and (is_expert or len(tensor.shape) >= 2)
    if tensor.dtype != FP8:
        if scale is not None:
            raise CheckpointError(
                f"{where}: {tensor.name}: has scales and is {tensor.dtype}, not {FP8}; only FP8 "
                "weights can be read, use the original checkpoint"
            )
        if is_weight and tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {tensor.name}: is {tensor.dtype}; weights have to be "
                f"{', '.join(FLOATS)} or {FP8}, use the original checkpoint"
            )
        return None
    if scale is None:
        raise CheckpointError(
            f"{where}: {tensor.name}: is {FP8} and has no scale (…{SCALE_SUFFIX} or "
            f"…{BLOCK_SCALE_SUFFIX}); download the checkpoint again, completely"
        )
    if len(tensor.shape) != 2 or scale.dtype not in FLOATS:
        raise CheckpointError(
            f"{where}: {tensor.name}: a quantized weight has two dimensions and float scales, not "
            f"{list(tensor.shape)} and {scale.dtype}"
        )
    rows, columns = tensor.shape
    if scale.name.endswith(BLOCK_SCALE_SUFFIX) and scheme is not None and scheme.block is not None:
        block = scheme.block
    elif scale.shape in ((), (1,), (1, 1)):
        block = (max(rows, 1), max(columns, 1))
    else:
        block = (1, max(columns, 1))
    expected = (-(-rows // block[0]), -(-columns // block[1]))
    if scale.shape not in (expected, expected[:1] if expected[1] == 1 else expected, ()):
        raise CheckpointError(
            f"{where}: {scale.name}: has shape {list(scale.shape)}, and {tensor.name} with "
            f"{list(tensor.shape)} takes {list(expected)}; download the checkpoint again"
        )
    return block


def _full_precision(config: Mapping[str, Any]) -> str:
    dtype = config.get("dtype", config.get("torch_dtype"))
    return _HF_DTYPES.get(dtype, "BF16") if isinstance(dtype, str) else "BF16"


def check_architecture(checkpoint: Checkpoint, family: MoEFamily) -> None:
    """Check that all experts are there and that shapes are those that the config says.

    Raises:
        CheckpointError: They are not; the message names the first tensor.
    """
    config, where = checkpoint.config, checkpoint.folder / CONFIG
    experts = family.experts_of(config)
    layers = _size(config, "num_hidden_layers", where)
    hidden = _size(config, "hidden_size", where)
    inner = family.intermediate_size_of(config)
    if experts is None or inner is None or experts < 1:
        raise CheckpointError(
            f"{where}: does not say how many experts a layer has and how wide they are; "
            "download it again"
        )
    found: dict[int, set[tuple[int, str]]] = defaultdict(set)
    for name, tensor in checkpoint.tensors.items():
        place = family.parse_expert_key(name)
        if place is not None and place.suffix == "weight":
            found[place.layer].add((place.expert, place.projection))
            expected = (hidden, inner) if place.projection == family.down else (inner, hidden)
            _expect_shape(checkpoint, tensor, expected)
        elif family.is_router_key(name) and name.endswith(".weight"):
            _expect_shape(checkpoint, tensor, (experts, hidden))
    dense = {
        int(match[1])
        for name in checkpoint.tensors
        if (match := re.search(r"(?:^|\.)layers\.(\d+)\.mlp\.(?:gate|up|down)_proj\.weight$", name))
    }
    wanted = {(expert, part) for expert in range(experts) for part in family.projections}
    for layer in range(layers):
        missing = sorted(wanted - found[layer])
        if missing and (found[layer] or layer not in dense):
            raise CheckpointError(
                f"{checkpoint.folder}: {family.expert_key(layer, *missing[0])}: is missing "
                f"({len(missing)} of {len(wanted)} of layer {layer}); download the checkpoint "
                "again, completely"
            )
        if found[layer] - wanted:
            extra = min(found[layer] - wanted)
            raise CheckpointError(
                f"{checkpoint.folder}: {family.expert_key(layer, *extra)}: is there, and "
                f"{CONFIG} says {experts} experts; one of them is another model's"
            )
    beyond = [layer for layer in found if layer >= layers and found[layer]]
    if beyond:
        raise CheckpointError(
            f"{checkpoint.folder}: has experts of layer {min(beyond)}, and {CONFIG} says "
            f"{layers} layers; one of them is another model's"
        )


def _size(config: Mapping[str, Any], name: str, where: object) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise CheckpointError(f"{where}: {name} is {value!r}, not a size; download it again")
    return value


def _expect_shape(checkpoint: Checkpoint, tensor: StoredTensor, expected: tuple[int, int]) -> None:
    if tensor.shape != expected:
        raise CheckpointError(
            f"{checkpoint.folder / tensor.file}: {tensor.name}: has shape {list(tensor.shape)}, "
            f"and {CONFIG} says {list(expected)}; one of them is another model's"
        )


def _plan_shards(tensors: Sequence[PlannedTensor], max_shard_bytes: int) -> Iterator[ShardPlan]:
    groups: list[list[PlannedTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        nbytes = sum(new.nbytes for new in tensor.outputs)
        if nbytes > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= nbytes
    for number, group in enumerate(groups, start=1):
        header, offsets, nbytes = lay_out(new for tensor in group for new in tensor.outputs)
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        yield ShardPlan(name, header, offsets, nbytes, tuple(group))


def _output_config(
    config: Mapping[str, Any], family: MoEFamily, tensors: Sequence[PlannedTensor]
) -> dict[str, Any]:
    """``config.json`` with what compressed-tensors needs to read the weights.

    The scheme is compressed-tensors' ``float-quantized``, one static scale for each channel, no
    quantization of activations.
    """
    weights = {
        "num_bits": 8,
        "type": "float",
        "strategy": "channel",
        "symmetric": True,
        "dynamic": False,
        "observer": "minmax",
    }
    scheme = {"targets": ["Linear"], "weights": weights}
    return {
        **config,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": sorted(set(_ignored(family, tensors))),
        },
    }


def _ignored(family: MoEFamily, tensors: Iterable[PlannedTensor]) -> Iterator[str]:
    for tensor in tensors:
        if tensor.treatment is Treatment.QUANTIZE or not _is_linear(tensor.source, family):
            continue
        module = _module(tensor.source.name)
        if tensor.is_expert:
            # One pattern for the experts of a layer, which may be hundreds.
            layer, expert, projection = module.rsplit(".", 2)
            del expert
            yield rf"re:^{re.escape(layer)}\.\d+\.{projection}$"
        else:
            yield module
