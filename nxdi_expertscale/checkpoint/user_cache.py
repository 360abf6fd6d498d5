"""Where this package keeps what it remembers for a user (XDG Base Directory Specification)."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Path of the package's folder in the user's cache; it may not exist yet.

    It is ``$XDG_CACHE_HOME/nxdi-expertscale``, or ``~/.cache/nxdi-expertscale`` where the variable
    is unset, empty or relative, as the specification asks for.

    Raises:
        RuntimeError: The variable is unset and the user has no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "nxdi-expertscale"
