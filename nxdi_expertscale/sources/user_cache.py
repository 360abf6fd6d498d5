"""Where this package keeps what it remembers for a user (XDG Base Directory Specification)."""

from __future__ import annotations

import os
from pathlib import Path

from nxdi_expertscale.errors import ConfigurationError


def user_cache() -> Path:
    """Path of the package's folder in the user's cache; it may not exist yet.

    It is ``$XDG_CACHE_HOME/nxdi-expertscale``, or ``~/.cache/nxdi-expertscale`` where the variable
    is unset, empty or relative, as the specification asks for.

    Raises:
        ConfigurationError: The variable is unset and the user has no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            raise ConfigurationError(
                "this user has no home folder; set XDG_CACHE_HOME to a folder that can be written"
            ) from None
    return base / "nxdi-expertscale"
