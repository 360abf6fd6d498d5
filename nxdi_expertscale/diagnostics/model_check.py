"""Whether one model can be quantized or served on this host."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import filesize

from nxdi_expertscale.checkpoint.neuron_config import read_neuron_settings
from nxdi_expertscale.checkpoint.read.model import Model, open_model
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST
from nxdi_expertscale.checkpoint.write.plan import make_plan
from nxdi_expertscale.diagnostics.findings import Finding, problem, warning
from nxdi_expertscale.diagnostics.serving import check_serving
from nxdi_expertscale.errors import ExpertScaleError
from nxdi_expertscale.families.declaration import MoEFamily

_SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True)
class ModelReport:
    """What was found of a model.

    Attributes:
        rows: What it is and takes, by name, as people read it.
        findings: What is wrong with it, or with this host for it.
        family: Its family, if it could be opened.
    """

    rows: dict[str, str]
    findings: tuple[Finding, ...]
    family: MoEFamily | None


def examine_model(path: Path) -> ModelReport:
    """Judge a checkpoint, an original or a finished one, and whether this host has room for it.

    Args:
        path: Its folder.
    """
    try:
        model = open_model(path)
        is_finished = (path / MANIFEST).is_file()
        nbytes = model.files.nbytes if is_finished else make_plan(model, (), _SHARD_BYTES).nbytes
    except ExpertScaleError as error:
        return ModelReport({}, (problem(str(error)),), None)
    size = filesize.decimal(nbytes)
    rows = {
        "model": str(path),
        "family": model.family.name,
        "experts": f"{model.config.num_experts} in a layer",
        "weights": model.scheme.name if model.scheme is not None else "full precision",
        "in FP8": size if is_finished else f"{size}, once it is quantized",
    }
    findings = _check_settings(model, path, is_finished=is_finished)
    findings += _check_memory(nbytes, rows)
    if not is_finished:
        findings += _check_disk(nbytes, path, rows)
    return ModelReport(rows, tuple(findings), model.family)


def _check_settings(model: Model, path: Path, *, is_finished: bool) -> list[Finding]:
    """By the rules of settings, with those that ``neuron-config`` prints."""
    settings: dict[str, Any] = {
        "quantized": True,
        "quantization_type": "per_channel_symmetric",
        "quantization_dtype": "f8e4m3",
        "expert_wise_scale": True,
    }
    try:
        if is_finished:
            _, found = read_neuron_settings(
                path, tp_degree=None, batch_size=None, seq_len=None, moe_ep_degree=None
            )
            settings = found.neuron_config
        check_serving(model, settings)
    except ExpertScaleError as error:
        return [problem(str(error))]
    return []


def _check_memory(nbytes: int, rows: dict[str, str]) -> Sequence[Finding]:
    # NxDI reads the whole state dict before it cuts it for the ranks.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows["memory of this host"] = filesize.decimal(memory)
    if memory >= nbytes:
        return []
    return [
        warning(
            f"the model has {filesize.decimal(nbytes)} of weights in FP8, and this host "
            f"{filesize.decimal(memory)} of memory: NxDI holds all of them while it loads"
        )
    ]


def _check_disk(nbytes: int, path: Path, rows: dict[str, str]) -> Sequence[Finding]:
    free = shutil.disk_usage(path).free
    rows["free disk beside it"] = filesize.decimal(free)
    if free >= nbytes:
        return []
    return [
        warning(
            f"{filesize.decimal(nbytes)} are needed for the FP8 folder, and "
            f"{filesize.decimal(free)} are free beside {path}; quantize into another disk"
        )
    ]
