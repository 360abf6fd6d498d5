"""Reports when certain modules have been imported: for the first time, again, or by a reload.

wrapt's own post-import hooks fire once. A module that is reloaded, or imported again after a failed
attempt, would stay unpatched, and a model would compute wrong results without an error. Nor do they
see a module that is run with ``python -m``: here it is imported under its own name, and its
``main`` is called.
"""

from __future__ import annotations

import ast
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import cast

import wrapt

from nxdi_expertscale.hooking.module_names import ending_of, is_in_any_package

_logger = logging.getLogger(__name__)


class ImportWatcher(MetaPathFinder):
    """A finder on ``sys.meta_path`` that reports watched modules, which other finders find.

    Safe in threads: it holds no lock while a module is searched for, executed or reported.
    """

    def __init__(
        self,
        on_executed: Callable[[ModuleType], None],
        on_found: Callable[[Sequence[ModuleType]], None],
    ) -> None:
        """Watch nothing yet.

        Args:
            on_executed: Called with each watched module right after it was executed. What it
                raises fails the import.
            on_found: Called with modules that were executed before they were watched. Where
                threads import and watch at once, both may be called for one execution.
        """
        self._on_executed = on_executed
        self._on_found = on_found
        self._names: tuple[str, ...] = ()
        self._endings: tuple[str, ...] = ()
        self._unfinished: dict[str, ModuleType] = {}

    def watch(self, names: Sequence[str]) -> None:
        """Watch these modules and no others; with none, leave ``sys.meta_path``.

        To be called by one thread at a time.

        Args:
            names: Full names, or files in whatever package (``*.modeling_olmoe``). Of the latter,
                each module of that name is reported.
        """
        self._names = tuple(name for name in names if not is_in_any_package(name))
        self._endings = tuple(map(ending_of, filter(is_in_any_package, names)))
        self._unfinished.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if names:
            sys.meta_path.insert(0, self)

    def report_loaded(self) -> None:
        """Report the watched modules that are loaded already.

        An import that another thread has begun is waited for. One that this thread is in the
        midst of is reported by the first import after its end.
        """
        found = []
        for name in [*self._names, *filter(self._is_file, list(sys.modules))]:
            if _is_initializing(sys.modules.get(name)):
                _wait_for_other_threads(name)
            module = sys.modules.get(name)
            if module is None:
                continue
            if _is_initializing(module):
                self._unfinished[name] = module
            else:
                found.append(module)
        self._on_found(found)

    def report_finished(self) -> None:
        """Report the modules whose import had begun when they were first watched, and has ended."""
        for name, module in list(self._unfinished.items()):
            if _is_initializing(module) or self._unfinished.pop(name, None) is None:
                continue
            # An import that has failed leaves nothing to report.
            if sys.modules.get(name) is module:
                self._on_found([module])

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Find a watched module as the other finders do, with a loader that reports it."""
        if self._unfinished:
            self.report_finished()
        if not self._is_watched(fullname):
            return None
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec: ModuleSpec | None = find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = cast(Loader, _ReportingLoader(spec.loader, self._report))
                return spec
        return None

    def _report(self, module: ModuleType) -> None:
        # It may be watched no longer, since it was found.
        if self._is_watched(module.__name__):
            self._on_executed(module)

    def _is_watched(self, name: str) -> bool:
        return name in self._names or self._is_file(name)

    def _is_file(self, name: str) -> bool:
        # Every import asks.
        return f".{name}".endswith(self._endings)


# wrapt's classes take type arguments from 2.0 on only.
class _ReportingLoader(wrapt.ObjectProxy):  # type: ignore[type-arg]
    """A module's loader, which reports the module after executing it."""

    def __init__(self, loader: Loader, report: Callable[[ModuleType], None]) -> None:
        super().__init__(loader)
        self._self_report = report

    def exec_module(self, module: ModuleType) -> None:
        self._self_restore_loader(module)
        self.__wrapped__.exec_module(module)
        self._self_report(module)

    def get_code(self, fullname: str) -> CodeType | None:
        """The code that runpy executes as ``__main__``, without asking for the module.

        It imports the module under its own name, by which it is reported as in any import, and
        calls its ``main``.
        """
        loader: InspectLoader = self.__wrapped__
        code = loader.get_code(fullname)
        if _only_calls_main(loader.get_source(fullname)):
            program = f"from {fullname} import main\n{_MAIN_PART}\n"
            return compile(program, f"<main of {fullname}>", "exec", dont_inherit=True)
        _logger.warning(
            "%s is run as a program and is not patched: its source does not end with a call of "
            "main() and nothing else",
            fullname,
        )
        return code

    def _self_restore_loader(self, module: ModuleType) -> None:
        # Resources, inspect and pickle look at the loader: they must see the real one.
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self.__wrapped__
        spec = module.__spec__
        if spec is not None and cast(object, spec.loader) is self:
            spec.loader = self.__wrapped__


_MAIN_PART = "if __name__ == '__main__':\n    main()"


def _only_calls_main(source: str | None) -> bool:
    """Whether all that a module does as a program is to call its ``main``, at its end."""
    statements = ast.parse(source or "").body
    return bool(statements) and ast.unparse(statements[-1]) == _MAIN_PART


def is_loaded(name: str) -> bool:
    """Whether a module has been imported to its end."""
    module = sys.modules.get(name)
    return module is not None and not _is_initializing(module)


def _is_initializing(module: ModuleType | None) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _wait_for_other_threads(name: str) -> None:
    # The import system waits for a module that another thread is importing, and returns at once
    # in the thread that is importing it.
    try:
        importlib.import_module(name)
    except Exception as error:
        # It is raised in the thread of that import as well; the next import is watched.
        _logger.debug("import of %s failed while it was waited for: %s", name, error)
