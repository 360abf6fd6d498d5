"""The files beside the weights: tokenizer, generation config, chat template, licence.

They are copied into a new checkpoint as data. Code of a checkpoint is not: neither scripts and
binaries, nor the ``auto_map`` by which a config has transformers load Python from the folder, or
from another repository of the Hugging Face hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from nxdi_expertscale.checkpoint.json_files import parse_any_json
from nxdi_expertscale.checkpoint.read.files import CONFIG, INDEX
from nxdi_expertscale.sources.source import Source

MAX_AUXILIARY_BYTES = 256 << 20
"""Longer than any tokenizer."""

AUTO_MAP = "auto_map"

_COPIED = (
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "*.jinja",
    "*.json",
    "*.model",
    "*.tiktoken",
    "*.txt",
)

_NOT_COPIED = ("*.index.json", "adapter_config.json")
"""What would have other weights loaded, or an adapter put on top of them."""

_SCRIPTS = ("*.py", "*.sh")

_SENTENCEPIECE = b"\n"
"""How a ``*.model`` begins that is no text: with the first field of its message."""


@dataclass(frozen=True)
class AuxiliaryFiles:
    """The files beside the weights of a checkpoint.

    Attributes:
        names: Names of those that are copied.
        code: What of the checkpoint is code, and is not copied: files, and ``auto_map`` of
            configs.
    """

    names: tuple[str, ...]
    code: tuple[str, ...]


def find_auxiliary_files(folder: Source, leave_out: Iterable[str] = ()) -> AuxiliaryFiles:
    """Find the files beside the weights, and check that they are what they are named as.

    Args:
        folder: The checkpoint's folder.
        leave_out: Names that are left out, beside the config and the index.

    Raises:
        CheckpointError: One is not a regular file, leads out of the folder, is too long, or is
            named as JSON and is not.
    """
    skipped = {CONFIG, INDEX, *leave_out}
    names, code = list[str](), list[str]()
    for name in folder.names():
        if name.startswith("."):
            continue
        if name == CONFIG:
            code += _find_auto_maps(name, _parse(folder, name, _read(folder, name)))
        elif _matches(name, _SCRIPTS):
            code.append(name)
        elif name not in skipped and _matches(name, _COPIED) and not _matches(name, _NOT_COPIED):
            content = _read(folder, name)
            if name.endswith(".json"):
                code += _find_auto_maps(name, _parse(folder, name, content))
            elif not _is_data(name, content):
                code.append(name)
                continue
            names.append(name)
    return AuxiliaryFiles(tuple(names), tuple(code))


def read_auxiliary_file(folder: Source, name: str) -> bytes:
    """Read a file beside the weights as it is copied: without ``auto_map``, if it is JSON.

    Raises:
        CheckpointError: It is missing, or too long.
    """
    content = _read(folder, name)
    value = _parse(folder, name, content) if name.endswith(".json") else None
    if next(_auto_maps(value), None) is None:
        return content
    # ASCII: what is no whole character is kept as it was written.
    return (json.dumps(without_auto_map(value), indent=2) + "\n").encode()


def without_auto_map(value: Any) -> Any:
    """Parsed JSON without the names of Python classes that transformers would load."""
    if isinstance(value, Mapping):
        return {key: without_auto_map(part) for key, part in value.items() if key != AUTO_MAP}
    if isinstance(value, list):
        return [without_auto_map(part) for part in value]
    return value


def _find_auto_maps(name: str, value: Any) -> Iterator[str]:
    for auto_map in _auto_maps(value):
        classes = list(_texts(auto_map))
        # "ORG/NAME--module.Class" is of another repository of the hub.
        remote = dict.fromkeys(text.partition("--")[0] for text in classes if "--" in text)
        yield f"{name}: {AUTO_MAP}" + (f" (of {', '.join(remote)})" if remote else "")


def _auto_maps(value: Any) -> Iterator[Any]:
    """Each ``auto_map`` in parsed JSON, at any level."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key == AUTO_MAP:
                yield part
            else:
                yield from _auto_maps(part)
    elif isinstance(value, list):
        for part in value:
            yield from _auto_maps(part)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def _is_data(name: str, content: bytes) -> bool:
    """Whether a file is text that is no script, or the model of a SentencePiece tokenizer."""
    if name.endswith(".model") and content.startswith(_SENTENCEPIECE):
        return True
    if content.startswith(b"#!") or b"\0" in content:
        return False
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _parse(folder: Source, name: str, content: bytes) -> Any:
    return parse_any_json(content, folder.location(name))


def _read(folder: Source, name: str) -> bytes:
    return folder.read(name, limit=MAX_AUXILIARY_BYTES)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
