"""Patches of a file in whatever package: the copies of a contributed model that users make."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nxdi_expertscale.hooking.engine import Engine
from nxdi_expertscale.hooking.patch import Patch, State

Write = Callable[..., None]

CONTRIBUTED = """
    def convert(value):
        return value + 1

    class Model:
        @staticmethod
        def load(value):
            return convert(value)
"""
SAME_NAME = "def forward(value): return value"
IMPORTING = "from modeling_x import convert"
NAMES = ["modeling_x", "mine.modeling_x", "a.b.modeling_x"]
WAITS = "no module modeling_x that defines convert has been imported"


def add_hundred(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs) + 100


def patch(attribute: str = "convert", **settings: Any) -> Patch:
    return Patch(
        **{"seam": "x", "module": "*.modeling_x", "attribute": attribute, "wrapper": add_hundred}
        | settings
    )


def write_named(write_module: Write, name: str, source: str = CONTRIBUTED) -> None:
    write_module(**{name.replace(".", "__"): source})


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.deactivate()


def test_it_waits_and_says_for_what(engine: Engine) -> None:
    engine.activate([patch()])

    [seam] = engine.status()
    assert (seam.module, seam.state, seam.reason) == ("*.modeling_x", State.WAITING, WAITS)
    assert engine.find_failed_seam(["x"], load=True) is None
    assert engine.find_failed_seam(["x"], load=True, may_wait=False) == seam
    assert str(seam) == f"seam 'x' (*.modeling_x.convert): {WAITS}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_it_is_found_in_any_package(
    write_module: Write, engine: Engine, name: str, before: bool
) -> None:
    write_named(write_module, name)
    if before:
        importlib.import_module(name)
    engine.activate([patch()])
    module = importlib.import_module(name)

    assert module.Model.load(1) == 102
    [seam] = engine.status()
    assert (seam.module, seam.state, seam.reason) == (name, State.APPLIED, "")
    assert engine.find_failed_seam(["x"], load=True, may_wait=False) is None
    assert pickle.loads(pickle.dumps(module.convert)) is module.convert
    engine.deactivate()
    assert module.Model.load(1) == 2


@pytest.mark.parametrize("attribute", ["Model.load", "convert"])
def test_function_and_method_are_patched(
    write_module: Write, engine: Engine, attribute: str
) -> None:
    write_named(write_module, "mine.modeling_x")
    engine.activate([patch(attribute)])

    assert importlib.import_module("mine.modeling_x").Model.load(1) == 102


@pytest.mark.parametrize("name", ["amodeling_x", "mine.modeling_xy", "modeling_x_2.other"])
def test_module_of_another_name_is_left_alone(
    write_module: Write, engine: Engine, name: str
) -> None:
    write_named(write_module, name)
    engine.activate([patch()])

    assert importlib.import_module(name).convert(1) == 2
    assert engine.find_failed_seam(["x"], load=True, may_wait=False) is not None


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_module_of_this_name_without_the_function_is_anothers(
    write_module: Write, engine: Engine, before: bool
) -> None:
    # transformers has a modeling_olmoe of its own.
    write_named(write_module, "theirs.modeling_x", SAME_NAME)
    if before:
        importlib.import_module("theirs.modeling_x")
    engine.activate([patch()])
    theirs = importlib.import_module("theirs.modeling_x")

    assert vars(theirs)["forward"](1) == 1
    [seam] = engine.status()
    assert (seam.state, seam.reason) == (State.WAITING, WAITS)

    write_named(write_module, "mine.modeling_x")
    assert importlib.import_module("mine.modeling_x").convert(1) == 102
    assert engine.status()[0].module == "mine.modeling_x"


def test_names_in_other_modules_follow_it(write_module: Write, engine: Engine) -> None:
    write_named(write_module, "modeling_x")
    write_module(importer=IMPORTING, late=IMPORTING, shim__modeling_x=IMPORTING)
    importer, shim = map(importlib.import_module, ("importer", "shim.modeling_x"))
    engine.activate([patch()])
    late = importlib.import_module("late")

    assert [module.convert(1) for module in (importer, shim, late)] == [102] * 3
    assert [seam.module for seam in engine.status()] == ["modeling_x"]
    engine.deactivate()
    assert [module.convert(1) for module in (importer, shim)] == [2] * 2


def test_function_that_was_taken_before_is_refused_by_name(
    write_module: Write, engine: Engine
) -> None:
    write_named(write_module, "mine.modeling_x")
    write_module(
        importer="""
            from mine.modeling_x import convert
            def load(value, convert=convert): return convert(value)
        """
    )
    importlib.import_module("importer")
    engine.activate([patch()])

    failed = engine.find_failed_seam(["x"], load=True)
    assert failed is not None
    assert (failed.module, failed.state) == ("mine.modeling_x", State.PARTIAL)
    assert failed.reason.startswith("importer.load holds the function as it was")


def test_two_copies_are_patched_and_the_worse_one_counts(
    write_module: Write, engine: Engine
) -> None:
    for name in NAMES:
        write_named(write_module, name)

    def find_incompatibility(module: ModuleType) -> str | None:
        return "it is the second" if module.__name__ == NAMES[1] else None

    engine.activate([patch(find_incompatibility=find_incompatibility)])
    results = [importlib.import_module(name).convert(1) for name in NAMES]

    assert results == [102, 2, 102]
    [seam] = engine.status()
    assert (seam.module, seam.state, seam.reason) == (
        NAMES[1],
        State.INCOMPATIBLE,
        "it is the second",
    )


def test_reloaded_copy_is_patched_once(write_module: Write, engine: Engine) -> None:
    write_named(write_module, "mine.modeling_x")
    engine.activate([patch()])
    module = importlib.import_module("mine.modeling_x")
    importlib.reload(module)
    engine.activate([patch()])

    assert module.convert(1) == 102
    engine.deactivate()
    assert module.convert(1) == 2


def load_by_path(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_file_that_is_loaded_by_its_path_is_found_when_it_is_needed(
    write_module: Write, engine: Engine, tmp_path: Path
) -> None:
    write_named(write_module, "mine.modeling_x")
    engine.activate([patch()])
    module = load_by_path(tmp_path / "mine" / "modeling_x.py", "my_model")

    assert module.convert(1) == 2
    assert engine.find_failed_seam(["x"], load=True, may_wait=False) is None
    assert module.convert(1) == 102
    assert engine.status()[0].module == "my_model"
    engine.deactivate()
    assert module.convert(1) == 2
