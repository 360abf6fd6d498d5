"""The model card of a finished folder: what it is, how it was made, what it costs, what serves it.

It is Markdown behind a block of YAML, as the Hugging Face hub reads it in ``README.md``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from nxdi_expertscale.checkpoint.quantization_error import LayerError, decibels
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.checkpoint.write.manifest import read_manifest
from nxdi_expertscale.errors import counted
from nxdi_expertscale.sources.folder import open_folder

CARD = "README.md"
"""The hub's name of a card."""

MAX_CARD_BYTES = 8 << 20
"""Longer than any card."""

_KEPT_KEYS = ("license", "license_name", "license_link", "language")
"""What a derived model has in common with its source."""

_FRONT_MATTER = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)


def model_card(
    folder: str | os.PathLike[str],
    base_model: str,
    *,
    revision: str | None = None,
    source: str | os.PathLike[str] | None = None,
    errors: Sequence[LayerError] = (),
) -> str:
    """Write the card of a folder that ``quantize`` finished.

    Args:
        folder: The folder.
        base_model: Name of the original on the hub, such as ``Qwen/Qwen3-30B-A3B``.
        revision: The original's revision, where it is known.
        source: The original's folder, whose card, if it has one, is kept below a line.
        errors: The error of each layer against the original, as ``verify`` measures it.

    Raises:
        CheckpointError: The folder was not made by ``quantize``, or is damaged.
    """
    manifest = read_manifest(folder)
    model = open_model(folder)
    original = _read_card(source)
    tensors = ", ".join(f"{number} {kind}" for kind, number in manifest.tensors.items() if number)
    kept = ", ".join(f"`{name}`" for name in manifest.modules_to_not_convert)
    of_revision = f", revision `{revision}`" if revision else ""
    at_revision = f" --revision {revision}" if revision else ""
    parts = [
        f"# {Path(folder).absolute().name}",
        f"`{base_model}`{of_revision} in FP8 (E4M3 within ±240, the range of Trainium), with one "
        f"scale for each output channel of each of the {model.config.num_experts} experts in a "
        "layer.",
        "## How it was made",
        f"By nxdi-expertscale {manifest.version}, without calibration: {tensors}, in "
        f"{counted(len(manifest.shards), 'file')} of weights. "
        + (f"In full precision: {kept}." if kept else "Routers stay in full precision."),
        "```bash\n"
        f"hf download {base_model}{at_revision} --local-dir ORIGINAL\n"
        f"nxdi-expertscale quantize ORIGINAL FP8{_options(manifest.modules_to_not_convert)}\n"
        "```",
        *_error_parts(errors),
        "## What serves it",
        "- NxDI 0.5 to 0.9 and vLLM-Neuron 0.2.0 to 0.5.0 (Neuron SDK 2.25 to 2.29) with "
        "nxdi-expertscale installed: `nxdi-expertscale neuron-config FP8 --format vllm` prints the "
        "command. The native vLLM-Neuron (SDK 2.32 on) refuses it.\n"
        "- transformers with compressed-tensors, which also rounds activations to FP8.\n"
        + _of_gpus("lm_head.weight_scale" not in model.files.tensors),
    ]
    body = "\n\n".join(parts) + "\n"
    if original is not None:
        body += f"\n---\n\nThe card of {base_model}:\n\n{_body_of(original).lstrip()}"
    return f"{_metadata(base_model, original)}\n{body}"


def _options(names: Sequence[str]) -> str:
    return "".join(f" --modules-to-not-convert {json.dumps(name)}" for name in names)


def _of_gpus(has_full_head: bool) -> str:
    if has_full_head:
        return "- vLLM on a GPU with FP8, as W8A8 by channel and token."
    return "- Not vLLM on a GPU, which reads no quantized `lm_head`."


def _error_parts(errors: Sequence[LayerError]) -> list[str]:
    if not errors:
        return []
    rows = [
        f"| {error.layer} | {decibels(error.snr_db)} | `{error.worst_tensor}` | "
        f"{decibels(error.worst_snr_db)} |"
        for error in errors
    ]
    head = ["| layer | signal to noise | worst weight | its own |", "|---|---:|---|---:|"]
    return ["## Error of the weights", "\n".join([*head, *rows])]


def _metadata(base_model: str, original: str | None) -> str:
    match = _FRONT_MATTER.match(original or "")
    kept = [_field(match[1], key) for key in _KEPT_KEYS] if match else []
    lines = [
        *filter(None, kept),
        # JSON's strings are YAML's.
        f"base_model: {json.dumps(base_model)}",
        "base_model_relation: quantized",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in ("fp8", "compressed-tensors", "moe", "aws-neuron", "trainium")),
    ]
    return "\n".join(["---", *lines, "---", ""])


def _field(text: str, key: str) -> str | None:
    """The lines of a field of YAML, with the list that may stand below it."""
    match = re.search(rf"^{key}:.*(?:\n[ -].*)*", text, re.MULTILINE)
    return None if match is None else match[0]


def _body_of(card: str) -> str:
    return _FRONT_MATTER.sub("", card, count=1)


def _read_card(source: str | os.PathLike[str] | None) -> str | None:
    if source is None or not (Path(source) / CARD).is_file():
        return None
    content = open_folder(source).read(CARD, limit=MAX_CARD_BYTES)
    return content.decode("utf-8", "replace").replace("\r\n", "\n")
