"""Extracts the sources of the contributed models from a clone of NxDI's repository.

    python -m tests.contributions.extract GIT_DIR FOLDER

The clone has to have the pull requests (``git fetch origin '+refs/pull/*/head:refs/pull/*/head'``).
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.contributions.models import ALL
from tests.contributions.unsupported import CONTRIBUTED, place_of


def extract(git_dir: Path, ref: str, path: str, folder: Path) -> None:
    """Write what a commit has under a path into a folder.

    Raises:
        subprocess.CalledProcessError: The repository has no such commit or path.
    """
    command = ["git", f"--git-dir={git_dir}", "archive", "--format=tar", f"{ref}:{path}"]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def main() -> int:
    """Extract every contribution, and what is unsupported; 1 if the clone lacks one."""
    parser = argparse.ArgumentParser(prog="python -m tests.contributions.extract")
    parser.add_argument("git_dir", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    status = 0
    wanted = {model.key: (model.ref, model.path) for model in ALL}
    for model_type, model in CONTRIBUTED.items():
        place = place_of(model)
        wanted[model_type] = (place.ref, place.folder)
    for key, (ref, path) in wanted.items():
        try:
            extract(arguments.git_dir, ref, path, arguments.folder / key)
        except subprocess.CalledProcessError as error:
            print(f"{key}: {error.stderr.decode().strip()}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
