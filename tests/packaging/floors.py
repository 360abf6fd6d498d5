"""Installs the lowest version of each dependency that the package says is enough.

    python -m tests.packaging.floors [REQUIREMENT …]

torch stays what it is, for its own lowest is gigabytes. Further requirements are installed with
them, at once, so that pip refuses what does not go together.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

LEFT_ALONE = ("torch",)


def floors() -> Iterator[str]:
    """Each dependency of the installed package and of its extras, pinned to its lowest version."""
    for text in importlib.metadata.requires("nxdi-expertscale") or ():
        requirement = Requirement(text)
        if requirement.name in LEFT_ALONE:
            continue
        (floor,) = requirement.specifier
        if floor.operator != ">=":
            raise ValueError(f"{text}: it has no lowest version")
        yield f"{requirement.name}=={floor.version}"


if __name__ == "__main__":
    wanted = [*dict.fromkeys(floors()), *sys.argv[1:]]
    print("installing", *wanted)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
