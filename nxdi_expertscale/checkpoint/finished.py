"""Whether a finished folder is what its manifest says, and holds nothing that is loaded instead.

The digests of all files are checked once for a host and remembered (:mod:`.known_digests`), so
that only the first start after a change reads every byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from nxdi_expertscale.checkpoint.known_digests import KnownDigests
from nxdi_expertscale.checkpoint.parallel import available_cores, for_each
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST, FileRecord, Manifest, read_manifest
from nxdi_expertscale.checkpoint.write.stray_weights import find_stray_weights
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.sources.folder import Folder, open_folder


def find_changed_files(
    folder: Folder,
    records: Iterable[FileRecord],
    digest: Callable[[Path], str],
    workers: int | None = None,
) -> dict[str, str]:
    """Find the files that are not as they were written.

    Args:
        folder: The folder.
        records: What was written.
        digest: Gives the digest of a file's content, in hexadecimal.
        workers: Threads; by default as many as there are cores for this process.

    Returns:
        What is wrong with each of them, by name.
    """
    changed: dict[str, str] = {}

    def check(record: FileRecord) -> None:
        try:
            path = folder.checked_path(record.name)
        except CheckpointError as error:
            changed[record.name] = str(error)
            return
        size = path.stat().st_size
        if size != record.size:
            changed[record.name] = f"has {size} bytes, and {record.size} were written"
        elif digest(path) != record.blake3:
            changed[record.name] = "has other content than was written (its checksum differs)"

    for_each(check, iter(records), workers or available_cores())
    return {name: changed[name] for name in sorted(changed)}


def is_finished(folder: Path) -> bool:
    """Whether ``quantize`` finished a folder; its files may have changed since."""
    return (folder / MANIFEST).is_file()


def check_finished(folder: Path) -> Manifest:
    """Check that a finished folder is, byte for byte, what ``quantize`` wrote.

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
    with KnownDigests() as known:
        changed = find_changed_files(opened, (*manifest.shards, *manifest.files), known.digest)
    for name, what in changed.items():
        raise CheckpointError(
            f"{folder / name}: {what}; copy the folder again, or remove it to have it made again "
            f"(nxdi-expertscale verify {folder} lists all faults)"
        )
    return manifest
