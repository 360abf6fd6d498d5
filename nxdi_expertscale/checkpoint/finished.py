"""Whether a finished folder is what its manifest says, and holds nothing that is loaded instead.

The digests of all files are checked once for a host and remembered (:mod:`.known_digests`), so
that only the first start after a change reads every byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from nxdi_expertscale.checkpoint.json_files import read_json
from nxdi_expertscale.checkpoint.known_digests import KnownDigests
from nxdi_expertscale.checkpoint.parallel import available_cores, for_each
from nxdi_expertscale.checkpoint.read.files import CONFIG, INDEX
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST, FileRecord, Manifest, read_manifest
from nxdi_expertscale.checkpoint.write.stray_weights import find_stray_weights
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.sources.folder import open_folder
from nxdi_expertscale.sources.source import Source


def find_changed_files(
    folder: Source,
    records: Iterable[FileRecord],
    digest: Callable[[str], str],
    workers: int | None = None,
) -> dict[str, str]:
    """Find the files that are not as they were written.

    Args:
        folder: The folder.
        records: What was written.
        digest: Gives the digest of a file's content by its name, in hexadecimal.
        workers: Threads; by default as many as there are cores for this process.

    Returns:
        What is wrong with each of them, by name.
    """
    changed: dict[str, str] = {}

    def check(record: FileRecord) -> None:
        if not folder.has(record.name):
            changed[record.name] = "is missing"
            return
        try:
            size = folder.size(record.name)
        except CheckpointError as error:
            changed[record.name] = str(error)
            return
        if size != record.size:
            changed[record.name] = f"has {size} bytes, and {record.size} were written"
        elif digest(record.name) != record.blake3:
            changed[record.name] = "has other content than was written (its checksum differs)"

    for_each(check, iter(records), workers or available_cores())
    return {name: changed[name] for name in sorted(changed)}


def is_finished(folder: Path) -> bool:
    """Whether ``quantize`` finished a folder; its files may have changed since."""
    return (folder / MANIFEST).is_file()


def check_finished(folder: Path) -> Manifest:
    """Check that what is loaded from a finished folder is, byte for byte, what was written.

    That are the files of weights, the index and the config. What else lies there, as the
    tokenizer and the generation config, may have been edited since; ``verify`` tells of it.

    Args:
        folder: A folder that :func:`is_finished`.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: A file is missing or was changed, or weights lie in the folder that would
            be loaded instead.
    """
    manifest = read_manifest(folder)
    opened = open_folder(folder)
    stray = find_stray_weights(opened.names(), manifest)
    if stray:
        raise CheckpointError(
            f"{folder / stray[0]}: is no part of the checkpoint, and would be loaded in place of "
            "its weights; remove it"
        )
    loaded = [record for record in manifest.files if record.name in (INDEX, CONFIG)]
    with KnownDigests() as known:
        changed = find_changed_files(
            opened,
            (*manifest.shards, *loaded),
            lambda name: known.digest(opened.checked_path(name)),
        )
    for name, what in changed.items():
        raise CheckpointError(
            f"{folder / name}: {what}; copy the folder again, or remove it to have it made again "
            f"(nxdi-expertscale verify {folder} lists all faults)"
        )
    return manifest


def tensor_names(folder: Path) -> frozenset[str]:
    """Names of the tensors of a finished folder, as its index has them.

    Raises:
        CheckpointError: The index is missing or damaged.
    """
    weight_map = read_json(open_folder(folder), INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map; run quantize again")
    return frozenset(weight_map)


def checked_tensors(folder: str | None) -> frozenset[str]:
    """Names of the tensors of a folder that need no look at their values: ``quantize`` made them.

    Args:
        folder: The folder that NxDI loads, whoever made it; None where it loads no other than the
            model's own.

    Returns:
        The names, as the checkpoint has them; none where ``quantize`` did not make the folder.

    Raises:
        CheckpointError: ``quantize`` made the folder, and it was changed since.
    """
    if not folder or not is_finished(Path(folder)):
        return frozenset()
    check_finished(Path(folder))
    return tensor_names(Path(folder))
