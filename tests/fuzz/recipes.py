"""Recipes for hostile checkpoints, as JSON: a good folder, and what is done to it, step by step.

A step is a list: what is done, a file (its number among the folder's files, or its name), and the
rest. A place in a JSON file, or in the header of a safetensors file, is a list of keys; a number
stands for the key of that number, so that any list of numbers leads somewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Files = dict[str, bytes]
"""A folder: its files by their path in it."""

Step = list[Any]

ROOM = "ROOM-FOR-RAW-TEXT"
MOST_BYTES = 1 << 40
"""A file is made no longer, though none of it is on the disk."""


class Folder:
    """A folder on the disk that is spoilt."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        self._names = sorted(files)

    def spoil(self, step: Step) -> None:
        kind, file, *rest = step
        name = file if isinstance(file, str) else self._names[file % len(self._names)]
        path = self.path / name
        # An earlier step may have taken the file away, or made it a link to somewhere else.
        if path.is_symlink() or not path.is_file():
            return
        _STEPS[kind](path, *rest)


def _cut(path: Path, length: int) -> None:
    os.truncate(path, length % (path.stat().st_size + 1))


def _stretch(path: Path, length: int) -> None:
    os.truncate(path, path.stat().st_size + length % MOST_BYTES)


def _overwrite(path: Path, position: int, data: str) -> None:
    with path.open("r+b") as file:
        file.seek(position % (path.stat().st_size + 1))
        file.write(bytes.fromhex(data))


def _length(path: Path, length: int) -> None:
    """Claim another length of the header."""
    with path.open("r+b") as file:
        file.write((length % (1 << 64)).to_bytes(8, "little"))


def _remove(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _copy(path: Path, name: str) -> None:
    copied = path.parent / name
    # An earlier step may have made it a folder, a pipe, or a link to somewhere else.
    is_free = copied.is_file() or not copied.exists()
    if copied.parent == path.parent and is_free and not copied.is_symlink():
        with path.open("rb") as file:
            copied.write_bytes(file.read(1 << 20))


def _set(path: Path, place: list[Any], value: Any) -> None:
    def change(parent: Any, key: Any) -> None:
        parent[key] = value

    _edit(path, place, change)


def _drop(path: Path, place: list[Any]) -> None:
    def change(parent: Any, key: Any) -> None:
        del parent[key]

    _edit(path, place, change)


def _rename(path: Path, place: list[Any], name: str) -> None:
    def change(parent: Any, key: Any) -> None:
        if isinstance(parent, dict):
            parent[name] = parent.pop(key)

    _edit(path, place, change)


def _raw(path: Path, place: list[Any], text: str) -> None:
    """Put in text that need not be JSON."""

    def change(parent: Any, key: Any) -> None:
        parent[key] = ROOM

    _edit(path, place, change, raw=text)


def _nest(path: Path, place: list[Any], depth: int) -> None:
    depth %= 200_000
    _raw(path, place, "[" * depth + "]" * depth)


def _twice(path: Path, place: list[Any], name: str) -> None:
    """Put in an object that has a name twice."""
    key = json.dumps(name)
    _raw(path, place, f"{{{key}: 1, {key}: 2}}")


def _tensor(path: Path, name: str, dtype: str, shape: list[int]) -> None:
    """Add a tensor, or give one another shape, in a file that is right in all else."""
    header, data = _split(path)
    if data is None:
        return
    found = {key: entry for key, entry in header.items() if isinstance(entry, dict)}
    size = {"F8_E4M3": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I64": 8}[dtype]
    for length in shape:
        size *= length
    begin = max((e["data_offsets"][1] for e in found.values() if _has_offsets(e)), default=0)
    if not 0 <= size < MOST_BYTES or not 0 <= begin < MOST_BYTES:
        return
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
    _join(path, json.dumps(header).encode(), data)
    os.truncate(path, path.stat().st_size - len(data) + begin + size)


def _has_offsets(entry: Mapping[str, Any]) -> bool:
    offsets = entry.get("data_offsets")
    return isinstance(offsets, list) and len(offsets) == 2 and type(offsets[1]) is int


_STEPS: dict[str, Callable[..., None]] = {
    "cut": _cut,
    "stretch": _stretch,
    "overwrite": _overwrite,
    "length": _length,
    "remove": _remove,
    "folder": _folder,
    "pipe": _pipe,
    "link": _link,
    "copy": _copy,
    "set": _set,
    "drop": _drop,
    "rename": _rename,
    "raw": _raw,
    "nest": _nest,
    "twice": _twice,
    "tensor": _tensor,
}


def _edit(
    path: Path, place: list[Any], change: Callable[[Any, Any], None], raw: str | None = None
) -> None:
    value, data = _split(path)
    parent, key = value, None
    for number, step in enumerate(place):
        keys = _keys(parent)
        if isinstance(parent, dict) and isinstance(step, str):
            key = step
        elif keys:
            key = keys[step % len(keys)] if isinstance(step, int) else keys[0]
        else:
            return
        if number + 1 < len(place):
            child = parent.get(key) if isinstance(parent, dict) else parent[key]
            if not isinstance(child, (dict, list)):
                break
            parent = child
    if key is None:
        return
    try:
        change(parent, key)
    except KeyError:
        return
    text = json.dumps(value)
    if raw is not None:
        text = text.replace(json.dumps(ROOM), raw)
    _join(path, text.encode("utf-8", "surrogatepass"), data)


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    return list(range(len(value))) if isinstance(value, list) else []


def _split(path: Path) -> tuple[dict[str, Any], bytes | None]:
    """The JSON of a file, and the data behind it in a safetensors file."""
    with path.open("rb") as file:
        content = file.read(1 << 20)
    data = None
    if path.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        content, data = content[8 : 8 + length], content[8 + length :]
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = {}
    return (value if isinstance(value, dict) else {}), data


def _join(path: Path, text: bytes, data: bytes | None) -> None:
    if data is None:
        path.write_bytes(text)
    else:
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
