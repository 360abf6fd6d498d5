"""Whether a finished folder was made from a source: by content, whatever files it came in.

Rows of every tensor of the source are converted again, and have to be the folder's bytes. That
holds for a source that was copied, moved, split into other files, or saved in a wider dtype, and
for no other model: one that was trained further differs in every tensor that was trained.

Small tensors are compared whole, of a large one a few rows: a change that leaves all of these as
they were is not found.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from nxdi_expertscale.checkpoint.known_digests import KnownDigests
from nxdi_expertscale.checkpoint.parallel import available_cores, for_each
from nxdi_expertscale.checkpoint.read.config import ModelConfig
from nxdi_expertscale.checkpoint.read.model import Model, open_model
from nxdi_expertscale.checkpoint.read.tensor_reader import TensorReader
from nxdi_expertscale.checkpoint.read.tensors import Weight
from nxdi_expertscale.checkpoint.read.values import TORCH_DTYPES, ValueReader
from nxdi_expertscale.checkpoint.write.convert import RowConverter
from nxdi_expertscale.checkpoint.write.manifest import Manifest, normalized, read_manifest
from nxdi_expertscale.checkpoint.write.plan import (
    PlannedTensor,
    Treatment,
    plan_tensors,
    tensors_to_quantize,
)
from nxdi_expertscale.version import __version__

WHOLE_ELEMENTS = 1 << 18
"""A tensor of no more elements is compared whole: norms, biases, routers."""

EXPERT_ROWS = 2
"""Rows that are compared of a large tensor of an expert, of which a model has thousands."""

OTHER_ROWS = 8
"""Rows that are compared of any other large tensor."""

_NOT_COMPARED = frozenset({"where", "raw", "dtype", "quantization_config"})
"""Fields of a config that may differ between two files of one model."""


def mismatch(
    folder: str | os.PathLike[str],
    src: str | os.PathLike[str],
    modules_to_not_convert: Sequence[str],
) -> str | None:
    """Find out why a finished folder is not what ``quantize`` would make; None if it is.

    Args:
        folder: The finished folder.
        src: The checkpoint that it should have been made from.
        modules_to_not_convert: The modules that should have been left in full precision.

    Raises:
        CheckpointError: The folder has no manifest, or one of the two is malformed.
    """
    manifest = read_manifest(folder)
    finished = open_model(folder)
    source = open_model(src, keep_mtp=finished.has_mtp)
    return mismatch_of(finished, manifest, source, modules_to_not_convert)


def remembered_mismatch(
    folder: Path, src: Path, modules_to_not_convert: Sequence[str]
) -> str | None:
    """As :func:`mismatch`, found out once for a host: as long as no file of the two changes."""
    files = [
        path
        for place in (folder, src)
        for kind in ("*.safetensors", "*.json")
        for path in place.glob(kind)
    ]
    question = f"mismatch {__version__} {sorted(set(modules_to_not_convert))}"
    with KnownDigests() as known:
        reason = known.answer(
            question, files, lambda: mismatch(folder, src, modules_to_not_convert) or ""
        )
    return reason or None


def mismatch_of(
    finished: Model, manifest: Manifest, source: Model, modules_to_not_convert: Sequence[str]
) -> str | None:
    """As :func:`mismatch`, for checkpoints that are open already.

    Args:
        finished: The finished folder.
        manifest: Its manifest.
        source: The checkpoint that it should have been made from.
        modules_to_not_convert: The modules that should have been left in full precision.
    """
    difference = _find_other_config(finished.config, source.config)
    if difference is not None:
        return f"made from another model: {difference}"
    if not _are_equivalent(manifest.modules_to_not_convert, modules_to_not_convert, source):
        return (
            f"made with other settings: modules_to_not_convert was "
            f"{list(manifest.modules_to_not_convert)}, and is "
            f"{list(normalized(modules_to_not_convert))}"
        )
    planned = plan_tensors(source, manifest.modules_to_not_convert)
    difference = _find_other_names(finished, planned) or _find_other_content(
        finished, source, planned
    )
    return None if difference is None else f"made from another source: {difference}"


def _find_other_config(finished: ModelConfig, source: ModelConfig) -> str | None:
    for field in fields(ModelConfig):
        ours, theirs = getattr(finished, field.name), getattr(source, field.name)
        # A library that saves a model again writes out what the original left to a default.
        if field.name in _NOT_COMPARED or None in (ours, theirs) or ours == theirs:
            continue
        return f"{field.name} is {theirs!r} in {source.where}, and {ours!r} in {finished.where}"
    return None


def _are_equivalent(made_with: Sequence[str], requested: Sequence[str], source: Model) -> bool:
    # NxDI's settings name modules both as the checkpoint and as NxDI does, and may name the router.
    return normalized(made_with) == normalized(requested) or tensors_to_quantize(
        source, made_with
    ) == tensors_to_quantize(source, requested)


def _find_other_names(finished: Model, planned: Sequence[PlannedTensor]) -> str | None:
    ours = {weight.name: weight for weight in finished.weights}
    theirs = {tensor.name: tensor for tensor in planned}
    # Of a model whose output layer is its embeddings, only some files have it twice.
    tied = finished.family.paths(f"{finished.family.head}.weight")
    for name in sorted(set(ours) ^ set(theirs)):
        if not (finished.config.tie_word_embeddings and name in tied):
            return f"{name} is {'in the source alone' if name in theirs else 'not in the source'}"
    for name in sorted(set(ours) & set(theirs)):
        if ours[name].tensor.shape != theirs[name].weight.tensor.shape:
            return (
                f"{name} has shape {list(ours[name].tensor.shape)}, and "
                f"{list(theirs[name].weight.tensor.shape)} in the source"
            )
        if (ours[name].scale is not None) != (theirs[name].treatment is Treatment.QUANTIZE):
            return f"{name} is quantized in one of the two alone"
    return None


def _find_other_content(
    finished: Model, source: Model, planned: Sequence[PlannedTensor]
) -> str | None:
    """Compare rows of every tensor; the first that differs, by name."""
    ours = {weight.name: weight for weight in finished.weights}
    different: list[str] = []
    with TensorReader(finished.files) as our_reader, TensorReader(source.files) as their_reader:
        our_values = ValueReader(finished.files, our_reader)
        their_values = ValueReader(source.files, their_reader)
        # What is halved shows in the scale, without reading all of the source.
        converter = RowConverter(
            their_values,
            exceeds_range=lambda weight: (
                not _have_equal_scales(our_values, ours[weight.name], their_values, weight)
            ),
        )

        def compare(tensor: PlannedTensor) -> None:
            weight = ours[tensor.name]
            same = all(
                _are_equal(our_values, weight, converter.convert(tensor, rows).outputs, rows)
                for rows in sample_rows(tensor.weight)
            )
            if not same:
                different.append(tensor.name)

        for_each(compare, (t for t in planned if t.name in ours), available_cores())
    return f"{min(different)} has other content" if different else None


def _have_equal_scales(
    our_values: ValueReader, ours: Weight, their_values: ValueReader, theirs: Weight
) -> bool:
    assert ours.scale is not None
    assert theirs.scale is not None
    first, columns = range(1), ours.tensor.columns
    return torch.equal(
        our_values.scale(ours.scale, first, columns),
        their_values.scale(theirs.scale, first, columns),
    )


def sample_rows(weight: Weight) -> Iterator[range]:
    """The rows of a weight that are compared.

    They are spread over the weight, each weight's from another row on.
    """
    rows, columns = weight.tensor.rows, weight.tensor.columns
    if rows * columns <= WHOLE_ELEMENTS or rows <= EXPERT_ROWS + OTHER_ROWS:
        yield range(rows)
        return
    seed = zlib.crc32(weight.name.encode())
    if weight.expert is not None:
        # Together, because each read of a few rows costs about as much as one of a single row.
        start = seed % max(1, rows - EXPERT_ROWS + 1)
        yield range(start, min(rows, start + EXPERT_ROWS))
        return
    for number in range(OTHER_ROWS):
        row = (seed + number * rows // OTHER_ROWS) % rows
        yield range(row, row + 1)


def _are_equal(
    reader: ValueReader, weight: Weight, expected: Mapping[str, torch.Tensor], rows: range
) -> bool:
    """Whether rows of a finished folder are what the source's rows were converted to."""
    values = expected[weight.name]
    if weight.scale is not None:
        (scale,) = (part for name, part in expected.items() if name != weight.name)
        return torch.equal(
            reader.stored(weight, rows).view(torch.uint8), values.view(torch.uint8)
        ) and torch.equal(reader.scale(weight.scale, rows, weight.tensor.columns), scale)
    stored = reader.stored(weight, rows)
    if weight.tensor.dtype not in TORCH_DTYPES or values.dtype == torch.uint8:
        return stored.dtype == values.dtype and torch.equal(stored, values)
    # One of the two may be a copy in a wider dtype.
    return torch.equal(stored.to(torch.float32), values.to(torch.float32))
