"""Whether a manifest describes the folder that it lies in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from nxdi_expertscale.checkpoint.read.files import CONFIG
from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.checkpoint.write.manifest import Manifest
from nxdi_expertscale.checkpoint.write.plan import KINDS
from nxdi_expertscale.sources.folder import is_file_name

_VERSION = re.compile(r"\d+\.\d+(\.\d+)*([a-z0-9.+-]*)")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def find_manifest_faults(manifest: Manifest, model: Model) -> Iterator[str]:
    """Find what a manifest says and is not so.

    Args:
        manifest: The manifest of a finished folder.
        model: The folder.
    """
    if _VERSION.fullmatch(manifest.version) is None:
        yield f"was made by version {manifest.version!r}, which is no version"
    if manifest.model_type != model.config.model_type:
        yield f"is of a {manifest.model_type!r}, and {CONFIG} of a {model.config.model_type!r}"
    yield from _find_count_faults(manifest, model)
    names = {record.name for record in manifest.shards}
    if names != set(model.files.headers):
        different = min(names ^ set(model.files.headers))
        yield f"{different} is a shard in one of manifest and index alone"
    quantized = {weight.name for weight in model.weights if weight.scale is not None}
    for name in set(manifest.below_floor) - quantized:
        yield f"says that {name!r} is too small for FP8, which is no quantized weight"
    yield from _find_source_faults(manifest)


def _find_count_faults(manifest: Manifest, model: Model) -> Iterator[str]:
    found = Counter(
        "quantized experts" if weight.expert is not None else "quantized linears"
        for weight in model.weights
        if weight.scale is not None
    )
    counts = dict(manifest.tensors)
    if set(counts) != set(KINDS):
        yield f"counts tensors of the kinds {sorted(counts)}, which are {sorted(KINDS)}"
        return
    for kind in ("quantized experts", "quantized linears"):
        if counts[kind] != found[kind]:
            yield f"counts {counts[kind]} {kind}, and there are {found[kind]}"
    others = counts["dequantized"] + counts["kept"]
    if min(counts.values()) < 0 or others != len(model.weights) - sum(found.values()):
        yield (
            f"counts {others} tensors that are not quantized, and there are "
            f"{len(model.weights) - sum(found.values())}"
        )


def _find_source_faults(manifest: Manifest) -> Iterator[str]:
    names = [record.name for record in manifest.source]
    if CONFIG not in names or len(names) < 2 or len(set(names)) != len(names):
        yield f"names the source files {sorted(names)}, which are those of no checkpoint"
    for record in manifest.source:
        if not is_file_name(record.name) or record.size < 1 or record.mtime_ns < 0:
            yield f"has a record of the source file {record.name!r} that is that of no file"
        elif _DIGEST.fullmatch(record.digest) is None:
            yield f"has a record of the source file {record.name!r} without its digest"
