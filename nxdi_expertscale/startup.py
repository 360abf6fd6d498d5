"""Activates the plugins that ``NXDI_PLUGINS`` names when the interpreter starts.

It is installed at the top of site-packages, as ``nxdi_expertscale_startup``, with a ``.pth`` file
and, for Python 3.15 on, a ``.start`` file (PEP 829) that call it. It is not a module of the
package, because importing the package activates it. Every interpreter of the environment may
import it, so it imports nothing that the interpreter has not loaded itself.
"""

import os
import site
import sys

_VARIABLE = "NXDI_PLUGINS"

_started = False


def start() -> None:
    """Activate what the variable names, now or as soon as ``sys.path`` is complete.

    Unset or empty, nothing is imported. A failure is one line on stderr: the interpreter goes on.
    """
    global _started  # noqa: PLW0603
    # The files are read once for each site-packages folder that has them.
    if _started or not os.environ.get(_VARIABLE):
        return
    _started = True
    if _site_is_completing_the_path():
        _activate_after_site()
    else:
        _activate()


def _site_is_completing_the_path() -> bool:
    # A .pth file is executed part way through: folders that later ones add, which may hold what
    # we import, are not on sys.path yet. A program that calls site.addsitedir itself is past that.
    callers = set()
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        callers.add(frame.f_code.co_name)
        if frame.f_code is site.main.__code__:
            return not callers & {"execsitecustomize", "execusercustomize"}
    return False


def _activate_after_site() -> None:
    """Activate as the last step of the site module: sitecustomize, or usercustomize if enabled."""
    run_sitecustomize, run_usercustomize = site.execsitecustomize, site.execusercustomize

    def execsitecustomize() -> None:
        site.execsitecustomize = run_sitecustomize
        try:
            run_sitecustomize()
        finally:
            # Whether there is a usercustomize is decided after the .pth files of a virtual
            # environment were read.
            if not site.ENABLE_USER_SITE:
                _activate()

    def execusercustomize() -> None:
        site.execusercustomize = run_usercustomize
        try:
            run_usercustomize()
        finally:
            _activate()

    site.execsitecustomize, site.execusercustomize = execsitecustomize, execusercustomize


def _activate() -> None:
    try:
        __import__("nxdi_expertscale")
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        # There is no stderr in a process that was started with it closed.
        if sys.stderr is not None:
            print(  # noqa: T201
                f"nxdi-expertscale: {_VARIABLE} is set, and activation failed: {message}",
                file=sys.stderr,
            )
