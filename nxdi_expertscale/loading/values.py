"""Whether the numbers of a quantized state dict are ones that Neuron can compute with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from nxdi_expertscale.checkpoint.parallel import available_cores, for_each
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.loading.names import scale_of
from nxdi_expertscale.numerics import fp8, scales

StateDict = Mapping[str, torch.Tensor]

CHUNK_BYTES = 1 << 24
"""Weights that a thread takes at a time: few enough for the threads to end together."""

_MAKE_IT_AGAIN = "make the checkpoint again with 'nxdi-expertscale quantize'"


def check_values(
    state_dict: StateDict,
    *,
    known: Collection[str] = (),
    workers: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Check all FP8 weights, and all scales of quantized weights, whatever module they are of.

    Args:
        state_dict: A checkpoint's tensors as NxDI's converter takes them. Those on the device
            ``meta`` have no values to check.
        known: Names of the tensors that are known to be right.
        workers: Threads that look at weights; by default as many as there are cores.
        chunk_bytes: Weights that a thread takes at a time.

    Raises:
        CheckpointError: An E4M3 weight goes beyond ±240, or a scale is not finite and positive.
            The message names the first one in the order of the state dict.
    """
    invalid = _first_invalid_scale(state_dict, known)
    if invalid is not None:
        raise CheckpointError(
            f"{invalid}: a scale must be finite and positive, and this one is not; {_MAKE_IT_AGAIN}"
        )
    names = [
        name
        for name, tensor in state_dict.items()
        if tensor.dtype == torch.float8_e4m3fn and name not in known and not tensor.is_meta
    ]
    chunks = list(_chunks(state_dict, names, chunk_bytes))
    beyond = _find_beyond_range(state_dict, chunks, workers or available_cores())
    if beyond:
        raise CheckpointError(
            f"{min(beyond, key=names.index)}: holds FP8 values beyond ±240, which Neuron reads as "
            f"infinity or NaN (a checkpoint made for GPUs); {_MAKE_IT_AGAIN}"
        )


def _first_invalid_scale(state_dict: StateDict, known: Collection[str]) -> str | None:
    names = _scales(state_dict, known)
    return next(
        (name for name in names if not scales.are_valid(state_dict[name].to(torch.float32))), None
    )


def _scales(state_dict: StateDict, known: Collection[str]) -> Iterator[str]:
    """Names of the scales of quantized weights, of activations as well, that are not known."""
    for name, tensor in state_dict.items():
        if tensor.is_meta or not fp8.is_quantized(tensor) or scale_of(name) in known:
            continue
        path = name.removesuffix("weight")
        names = (f"{path}scale", f"{path}weight_scale", f"{path}input_scale", f"{name}_scale_inv")
        yield from (scale for scale in names if scale in state_dict and scale not in known)


def _find_beyond_range(
    state_dict: StateDict, chunks: Sequence[Sequence[str]], workers: int
) -> list[str]:
    found: list[str] = []

    def look(chunk: Sequence[str]) -> None:
        found.extend(name for name in chunk if fp8.exceeds_range(state_dict[name]))

    if chunks:
        for_each(look, iter(chunks), min(workers, len(chunks)))
    return found


def _chunks(state_dict: StateDict, names: Sequence[str], nbytes: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    room = nbytes
    for name in names:
        chunk.append(name)
        room -= state_dict[name].nbytes
        if room <= 0:
            yield chunk
            chunk, room = [], nbytes
    if chunk:
        yield chunk
