"""The model card of a finished folder: what it is, how it was made, what it costs, what serves it.

It is Markdown behind a block of YAML, as the Hugging Face hub reads it in ``README.md``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nxdi_expertscale.checkpoint.quantization_error import LayerError, decibels
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.checkpoint.write.manifest import Manifest, read_manifest
from nxdi_expertscale.checkpoint.write.staging import CARD
from nxdi_expertscale.errors import counted, printable
from nxdi_expertscale.sources.folder import open_folder
from nxdi_expertscale.sources.source import Source

MAX_CARD_BYTES = 8 << 20
"""Longer than any card."""

_KEPT_KEYS = ("license", "license_name", "license_link", "language")
"""What a derived model has in common with its source."""

_HUB = "hf://"

_IN_CACHE = re.compile(r"/models--([^/]+--[^/]+)/snapshots/([0-9a-f]{40})$")

_DOWNLOADED = Path(".cache/huggingface/download/config.json.metadata")
"""In a folder that ``hf download`` made; its first line is the commit."""

_COMMIT_LENGTH = 40

_COMMIT = re.compile(r"[0-9a-f]{40}")

_FRONT_MATTER = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class BaseModel:
    """What a checkpoint was made from, as far as it is known.

    Attributes:
        name: Its name on the hub, such as ``Qwen/Qwen3-30B-A3B``; None if it is not known.
        revision: Its revision; None if it is not known.
    """

    name: str | None = None
    revision: str | None = None


def find_base_model(source: Source) -> BaseModel:
    """Find out what a source is a copy of.

    Known are a model that is read from the hub, the hub's cache
    (``models--org--name/snapshots/COMMIT``), and the revision of what ``hf download --local-dir``
    fetched.
    """
    if source.origin is not None and source.origin.startswith(_HUB):
        name, _, revision = source.origin.removeprefix(_HUB).partition("@")
        return BaseModel(name, revision or None)
    if not isinstance(source.path, Path):
        return BaseModel()
    cached = _IN_CACHE.search(source.path.as_posix())
    if cached is not None:
        return BaseModel(cached[1].replace("--", "/", 1), cached[2])
    return BaseModel(None, _downloaded_revision(source.path))


def _downloaded_revision(folder: Path) -> str | None:
    try:
        with (folder / _DOWNLOADED).open(encoding="utf-8") as file:
            commit = file.read(_COMMIT_LENGTH)
    except (OSError, UnicodeDecodeError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def read_card(source: Source) -> str | None:
    """The card of a source; None if it has none.

    Raises:
        CheckpointError: It cannot be read, or is longer than any card.
    """
    if not source.has(CARD):
        return None
    content = source.read(CARD, limit=MAX_CARD_BYTES)
    return content.decode("utf-8", "replace").replace("\r\n", "\n")


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
    return render_card(
        manifest,
        BaseModel(base_model, revision),
        num_experts=model.config.num_experts,
        has_full_head="lm_head.weight_scale" not in model.files.tensors,
        original=None if source is None else read_card(open_folder(source)),
        errors=errors,
    )


def render_card(
    manifest: Manifest,
    base: BaseModel,
    *,
    num_experts: int,
    has_full_head: bool,
    original: str | None,
    errors: Sequence[LayerError],
    how_measured: str = "Every value against the original's.",
) -> str:
    """Write a card.

    Args:
        manifest: How the checkpoint was made.
        base: What it was made from.
        num_experts: Experts of a layer.
        has_full_head: Whether the output layer is not quantized.
        original: The card of the original, which is kept below a line.
        errors: The error of each layer.
        how_measured: What the errors were measured on.
    """
    # Not the folder's name: the same source and settings give the same bytes, wherever they lie.
    name = base.name.rpartition("/")[2] if base.name else manifest.model_type
    tensors = ", ".join(f"{number} {kind}" for kind, number in manifest.tensors.items() if number)
    kept = ", ".join(f"`{name}`" for name in manifest.modules_to_not_convert)
    of_revision = f", revision `{base.revision}`," if base.revision else ""
    at_revision = f" --revision {base.revision}" if base.revision else ""
    parts = [
        f"# {printable(name)} in FP8, one scale per expert",
        f"{f'`{base.name}`' if base.name else 'The original model'}{of_revision} in FP8 (E4M3 "
        "within ±240, the range of Trainium), with one scale for each output channel of each of "
        f"the {num_experts} experts in a layer.",
        "## How it was made",
        f"By nxdi-expertscale {manifest.version}, without calibration: {tensors}, in "
        f"{counted(len(manifest.shards), 'file')} of weights. "
        + (f"In full precision: {kept}." if kept else "Routers stay in full precision."),
        "```bash\n"
        f"hf download {base.name or 'ORG/NAME'}{at_revision} --local-dir ORIGINAL\n"
        f"nxdi-expertscale quantize ORIGINAL FP8{_options(manifest.modules_to_not_convert)}\n"
        "```",
        *_error_parts(errors, how_measured),
        "## What serves it",
        "- NxDI 0.5 to 0.9 and vLLM-Neuron 0.2.0 to 0.5.0 (Neuron SDK 2.25 to 2.29) with "
        "nxdi-expertscale installed: `nxdi-expertscale neuron-config FP8 --format vllm` prints the "
        "command. The native vLLM-Neuron (SDK 2.32 on) refuses it.\n"
        "- transformers with compressed-tensors, which also rounds activations to FP8.\n"
        + _of_gpus(has_full_head),
    ]
    body = "\n\n".join(parts) + "\n"
    if original is not None:
        body += (
            f"\n---\n\nThe card of {base.name or 'the original model'}:\n\n"
            f"{_body_of(original).lstrip()}"
        )
    return f"{_metadata(base.name, original)}\n{body}"


def _options(names: Sequence[str]) -> str:
    return "".join(f" --modules-to-not-convert {json.dumps(name)}" for name in names)


def _of_gpus(has_full_head: bool) -> str:
    if has_full_head:
        return "- vLLM on a GPU with FP8, as W8A8 by channel and token."
    return "- Not vLLM on a GPU, which reads no quantized `lm_head`."


def _error_parts(errors: Sequence[LayerError], how_measured: str) -> list[str]:
    if not errors:
        return []
    rows = [
        f"| {error.layer} | {decibels(error.snr_db)} | `{error.worst_tensor}` | "
        f"{decibels(error.worst_snr_db)} |"
        for error in errors
    ]
    head = ["| layer | signal to noise | worst weight | its own |", "|---|---:|---|---:|"]
    return ["## Error of the weights", how_measured, "\n".join([*head, *rows])]


def _metadata(base_model: str | None, original: str | None) -> str:
    match = _FRONT_MATTER.match(original or "")
    kept = [_field(match[1], key) for key in _KEPT_KEYS] if match else []
    lines = [
        *filter(None, kept),
        *_base_lines(base_model),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in ("fp8", "compressed-tensors", "moe", "aws-neuron", "trainium")),
    ]
    return "\n".join(["---", *lines, "---", ""])


def _base_lines(base_model: str | None) -> list[str]:
    if base_model is None:
        return []
    # JSON's strings are YAML's.
    return [f"base_model: {json.dumps(base_model)}", "base_model_relation: quantized"]


def _field(text: str, key: str) -> str | None:
    """The lines of a field of YAML, with the list that may stand below it."""
    match = re.search(rf"^{key}:.*(?:\n[ -].*)*", text, re.MULTILINE)
    return None if match is None else match[0]


def _body_of(card: str) -> str:
    return _FRONT_MATTER.sub("", card, count=1)
