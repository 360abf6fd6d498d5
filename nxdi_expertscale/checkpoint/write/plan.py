"""The plan of a run: what is done with each tensor, and in which file it is written.

It is made from names, dtypes and shapes alone. No weight is read and nothing is written.
"""

from __future__ import annotations

import enum
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nxdi_expertscale.checkpoint.json_files import MAX_JSON_BYTES, render_json
from nxdi_expertscale.checkpoint.read.auxiliary import without_auto_map
from nxdi_expertscale.checkpoint.read.files import MAX_HEADERS_BYTES
from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.checkpoint.read.scales import SCALE_SUFFIX
from nxdi_expertscale.checkpoint.read.tensors import FP8, Weight, module_of
from nxdi_expertscale.checkpoint.safetensors_format import NewTensor, lay_out
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.exclusions import (
    Exclusions,
    find_part_of_fused,
)
from nxdi_expertscale.families.known_modules import check_names

MAX_SHARD_BYTES = 1_000_000_000
"""Size of the files of weights. A run that is cut off loses no more than those it was at."""

MAX_OPEN_SHARDS = 4
"""Shards that are written or stored at a time; what a destination in S3 needs of a disk."""

LM_HEAD = "lm_head"

_HF_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""The format's names of the dtypes that a config may name."""


class Treatment(enum.Enum):
    """What is done with a tensor."""

    QUANTIZE = "quantized"
    DEQUANTIZE = "dequantized"
    KEEP = "kept"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the source, what is done with it, and the dtype that it gets."""

    weight: Weight
    treatment: Treatment
    dtype: str

    @property
    def name(self) -> str:
        """Its name, in the source and in the output."""
        return self.weight.name

    @property
    def scale_name(self) -> str:
        """Name of the scale that it gets when it is quantized."""
        return f"{self.name.removesuffix('weight')}{SCALE_SUFFIX}"

    @property
    def outputs(self) -> Iterator[NewTensor]:
        """The tensors that are written for it."""
        shape = self.weight.tensor.shape
        yield NewTensor(self.name, self.dtype, shape)
        if self.treatment is Treatment.QUANTIZE:
            yield NewTensor(self.scale_name, "F32", (shape[0], 1))

    @property
    def kind(self) -> str:
        """What the summary counts it as."""
        if self.treatment is not Treatment.QUANTIZE:
            return str(self.treatment.value)
        return "quantized experts" if self.weight.expert is not None else "quantized linears"


KINDS = ("quantized experts", "quantized linears", "dequantized", "kept")
"""Every :attr:`PlannedTensor.kind`."""


@dataclass(frozen=True)
class ShardPlan:
    """A file of weights to be written.

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

    @property
    def source_bytes(self) -> int:
        """Bytes of the tensors that it is made from."""
        return sum(planned.weight.tensor.nbytes for planned in self.tensors)


@dataclass(frozen=True)
class Plan:
    """Everything that a run will write.

    Attributes:
        shards: The files of weights.
        index: What the index will hold.
        config: What ``config.json`` will hold.
        exclusions: Modules that stay in full precision: those that were requested, and those that
            NxDI cannot load quantized.
        kept_by_source: Modules that a quantized source has in full precision, and that stay so.
    """

    shards: tuple[ShardPlan, ...]
    index: Mapping[str, Any]
    config: Mapping[str, Any]
    exclusions: tuple[str, ...]
    kept_by_source: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors that they are made from."""
        return sum(shard.source_bytes for shard in self.shards)

    def count_kinds(self) -> dict[str, int]:
        """How many tensors there are of each kind."""
        counts = Counter(planned.kind for shard in self.shards for planned in shard.tensors)
        return {kind: counts[kind] for kind in KINDS}


def make_plan(model: Model, modules_to_not_convert: Iterable[str], max_shard_bytes: int) -> Plan:
    """Decide what is done with each tensor, and in which file it is written.

    What is quantized is what NxDI's own step quantizes (``application_base.py``,
    ``generate_quantized_state_dict``: every linear layer, ``lm_head`` too), except what NxDI
    cannot load quantized (:func:`~nxdi_expertscale.checkpoint.read.tensors.read_weights`).
    What is not quantized keeps its dtype; if it was quantized it gets the model's.

    Args:
        model: The source.
        modules_to_not_convert: Modules that stay in full precision; see
            :func:`~nxdi_expertscale.families.exclusions.Exclusions`.
        max_shard_bytes: Size at which a new file is begun.

    Raises:
        ConfigurationError: An exclusion names a part of what NxDI fuses, or no module.
    """
    requested = tuple(modules_to_not_convert)
    kept = kept_by_source(model)
    planned = plan_tensors(model, requested)
    shards = tuple(_plan_shards(planned, max_shard_bytes))
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    total = sum(new.nbytes for tensor in planned for new in tensor.outputs)
    return Plan(
        shards=shards,
        index={"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        config=_output_config(model.config.raw, planned),
        exclusions=effective_exclusions(model, (*requested, *kept)),
        kept_by_source=kept,
    )


def plan_tensors(model: Model, modules_to_not_convert: Iterable[str]) -> list[PlannedTensor]:
    """Decide what is done with each tensor, in the order of the source; see :func:`make_plan`."""
    requested = tuple(modules_to_not_convert)
    _check_exclusions(model, requested)
    names = effective_exclusions(model, (*requested, *kept_by_source(model)))
    exclusions = Exclusions(names, model.family)
    full_precision = _HF_DTYPES.get(model.config.dtype or "", "BF16")
    return [_plan_tensor(weight, exclusions, full_precision) for weight in model.weights]


def check_readable(plan: Plan) -> None:
    """Check that what is written stays within the limits of what is read.

    Raises:
        CheckpointError: It does not.
    """
    headers = sum(len(shard.header) for shard in plan.shards)
    index, config = render_json(plan.index), render_json(plan.config)
    if headers > MAX_HEADERS_BYTES or max(len(index), len(config)) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"the names of the checkpoint's tensors with their scales take {headers} bytes of "
            "headers, more than any real checkpoint needs; use the original checkpoint"
        )


def kept_by_source(model: Model) -> tuple[str, ...]:
    """The modules that a quantized source has in full precision, as exclusions.

    Who quantized it left them out on purpose (``ignore`` of compressed-tensors,
    ``modules_to_not_convert`` of Hugging Face's FP8). A layer's experts are named together, where
    none of them is quantized. Routers are never quantized, and not named.
    """
    if model.scheme is None:
        return ()
    family, names = model.family, dict[str, None]()
    quantized = {w.expert.layer for w in model.weights if w.expert and w.scale is not None}
    for weight in model.weights:
        if not weight.can_be_quantized or weight.scale:
            continue
        if weight.expert is None:
            names[weight.module.removeprefix("model.")] = None
        elif weight.expert.layer not in quantized:
            names[family.experts.format(layer=weight.expert.layer)] = None
    return tuple(names)


def effective_exclusions(model: Model, requested: Iterable[str]) -> tuple[str, ...]:
    """The exclusions that are requested, those of the family, and ``lm_head`` where it is tied."""
    # One table then serves both ends of the model, and a table of embeddings has no scales.
    tied = (LM_HEAD,) if model.config.tie_word_embeddings else ()
    return tuple(dict.fromkeys((*requested, *model.family.full_precision, *tied)))


def _check_exclusions(model: Model, requested: Sequence[str]) -> None:
    family, num_layers = model.family, model.config.num_hidden_layers
    part = find_part_of_fused(requested, num_layers, family, fused_qkv=False)
    if part is not None:
        raise part.to_error()
    check_names(requested, [weight.module for weight in model.weights], num_layers, family)


def excluded_modules(model: Model, modules_to_not_convert: Iterable[str]) -> set[str]:
    """The modules that exclusions keep in full precision, and those that always are; by paths.

    Raises:
        ConfigurationError: An exclusion names a part of what NxDI fuses, or no module.
    """
    requested = tuple(modules_to_not_convert)
    _check_exclusions(model, requested)
    exclusions = Exclusions(effective_exclusions(model, requested), model.family)
    return {weight.module for weight in model.weights if exclusions.leave_out(weight.module)}


def tensors_to_quantize(model: Model, modules_to_not_convert: Iterable[str]) -> set[str]:
    """Names of the tensors that a plan with these exclusions quantizes; see :func:`make_plan`."""
    requested = tuple(modules_to_not_convert)
    _check_exclusions(model, requested)
    names = effective_exclusions(model, (*requested, *kept_by_source(model)))
    exclusions = Exclusions(names, model.family)
    return {weight.name for weight in model.weights if _is_to_be_quantized(weight, exclusions)}


def _is_to_be_quantized(weight: Weight, exclusions: Exclusions) -> bool:
    return weight.can_be_quantized and not exclusions.leave_out(weight.module)


def _plan_tensor(weight: Weight, exclusions: Exclusions, full_precision: str) -> PlannedTensor:
    if _is_to_be_quantized(weight, exclusions):
        return PlannedTensor(weight, Treatment.QUANTIZE, FP8)
    if weight.scale is not None:
        return PlannedTensor(weight, Treatment.DEQUANTIZE, full_precision)
    return PlannedTensor(weight, Treatment.KEEP, weight.tensor.dtype)


def _plan_shards(tensors: Iterable[PlannedTensor], max_shard_bytes: int) -> Iterator[ShardPlan]:
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


def _output_config(config: Mapping[str, Any], tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
    """``config.json`` with what compressed-tensors needs to read the weights.

    The scheme is its ``float-quantized``: one static scale for each output channel. That
    activations are rounded too, with a scale for each token, is for vLLM on a GPU, which has no
    FP8 kernel for experts without it (``CompressedTensorsMoEMethod.get_moe_method`` of its
    ``compressed_tensors_moe.py``). NxDI does not read it, and computes with weights alone in FP8.
    """
    weights = {
        "num_bits": 8,
        "type": "float",
        "strategy": "channel",
        "symmetric": True,
        "dynamic": False,
        "observer": "minmax",
    }
    activations = {
        "num_bits": 8,
        "type": "float",
        "strategy": "token",
        "symmetric": True,
        "dynamic": True,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        **without_auto_map(config),
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": sorted(set(_ignored(tensors))),
        },
    }


def _ignored(tensors: Iterable[PlannedTensor]) -> Iterator[str]:
    for tensor in tensors:
        if tensor.treatment is Treatment.QUANTIZE or not tensor.weight.is_linear:
            continue
        if tensor.weight.expert is None:
            yield tensor.weight.module
        else:
            # One pattern for the experts of a layer, which may be hundreds.
            experts = module_of(module_of(tensor.weight.module))
            yield rf"re:^{re.escape(experts)}\.\d+\.{tensor.weight.expert.projection}$"
