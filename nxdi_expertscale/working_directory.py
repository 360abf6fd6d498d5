"""Keeps the code of the folder that ``python -m nxdi_expertscale`` is run in from being run.

``python -m`` puts the working directory before everything else on ``sys.path``, and a user may be
in a folder that was downloaded: a ``torch.py`` in it, or the entry points of a ``*.dist-info``,
would be found first. This module imports nothing that the interpreter has not loaded itself.
"""

import os
import sys

_PACKAGE = "nxdi_expertscale"


def is_run_as_module() -> bool:
    """Whether this process is ``python -m nxdi_expertscale``, and about to find ``__main__``."""
    # runpy sets the first argument so while it imports the package.
    if sys.argv[:1] != ["-m"] or "runpy" not in sys.modules:
        return False
    return sys.orig_argv[-len(sys.argv)].endswith(_PACKAGE)


def leave_off_path() -> None:
    """Take the working directory off ``sys.path``, if ``python -m`` has put it there.

    It stays where this package itself lies in it: that is a source tree, whose code is run anyway.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        return
    if sys.path[:1] == [here] and not os.path.samefile(here, _folder_of_package()):
        del sys.path[0]


def _folder_of_package() -> str:
    return os.path.dirname(os.path.dirname(__file__))
