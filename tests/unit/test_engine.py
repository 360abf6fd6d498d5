"""Patches on small modules: whatever way these are imported, and whoever else patches them."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import wrapt

from nxdi_expertscale.hooking import code
from nxdi_expertscale.hooking.engine import Engine
from nxdi_expertscale.hooking.patch import Patch, State

Write = Callable[..., None]

TARGET = """
    CALLS = []

    def compute(value: int, *, factor: int = 2) -> int:
        '''Multiply.'''
        return value * factor

    class Base:
        def inherited(self):
            return 'inherited'

    class Thing(Base):
        def __init__(self, size=1):
            self.size = size

        def method(self):
            return self.size

        @classmethod
        def build(cls, size):
            return cls(size)

        @staticmethod
        def halve(value):
            return value // 2
"""


def add_hundred(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs) + 100


def patch(attribute: str = "compute", module: str = "target", **settings: Any) -> Patch:
    return Patch(
        **{"seam": attribute, "module": module, "attribute": attribute, "wrapper": add_hundred}
        | settings
    )


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.deactivate()


def states(engine: Engine) -> dict[str, str]:
    return {seam.seam: str(seam.state) for seam in engine.status()}


def test_module_imported_afterwards_is_patched(write_module: Write, engine: Engine) -> None:
    write_module(target=TARGET)
    engine.activate([patch()])
    assert states(engine) == {"compute": "waiting"}

    import target

    assert target.compute(1) == 102
    assert states(engine) == {"compute": "applied"}


def test_module_imported_before_is_patched_at_once(write_module: Write, engine: Engine) -> None:
    write_module(target=TARGET)
    import target

    engine.activate([patch()])

    assert target.compute(1) == 102


def test_activating_twice_wraps_once(write_module: Write, engine: Engine) -> None:
    write_module(target=TARGET)
    import target

    engine.activate([patch()])
    first = target.compute
    engine.activate([patch()])

    assert target.compute is first
    assert target.compute(1) == 102


def test_activating_again_under_another_tools_wrapper_wraps_once(
    write_module: Write, engine: Engine
) -> None:
    write_module(target=TARGET)
    import target

    engine.activate([patch()])
    wrapt.wrap_function_wrapper("target", "compute", add_hundred)
    engine.activate([patch()])

    assert target.compute(1) == 2 + 100 + 100


@pytest.mark.parametrize("path", ["compute", "Thing.method", "Thing.build", "Thing.halve"])
def test_deactivation_gives_back_the_very_same_object(
    write_module: Write, engine: Engine, path: str
) -> None:
    write_module(target=TARGET)
    import target

    parent = target.Thing if "." in path else target
    name = path.rpartition(".")[2]
    before = dict(vars(parent))
    engine.activate([patch(path)])
    assert vars(parent)[name] is not before[name]

    engine.deactivate()

    assert dict(vars(parent)) == before
    assert vars(parent)[name] is before[name]
    assert engine.status() == ()


def test_methods_of_every_kind_are_patched(write_module: Write, engine: Engine) -> None:
    write_module(target=TARGET)
    import target

    def twice(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs), "patched"

    engine.activate(
        [*(patch(f"Thing.{name}", wrapper=twice) for name in ("method", "build", "halve"))]
    )

    thing = target.Thing(3)
    assert thing.method() == (3, "patched")
    built, _ = target.Thing.build(5)
    assert (type(built), built.size) == (target.Thing, 5)
    assert target.Thing.halve(9) == thing.halve(9) == (4, "patched")


def test_inherited_method_is_patched_in_the_class_alone_and_inherited_again(
    write_module: Write, engine: Engine
) -> None:
    write_module(target=TARGET)
    import target

    def loudly(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs).upper()

    engine.activate([patch("Thing.inherited", wrapper=loudly)])
    assert (target.Thing().inherited(), target.Base().inherited()) == ("INHERITED", "inherited")

    engine.deactivate()

    assert "inherited" not in vars(target.Thing)
    assert target.Thing().inherited() == "inherited"


def test_reloaded_module_is_patched_again_and_both_generations_are_given_back(
    write_module: Write, engine: Engine
) -> None:
    write_module(target=TARGET)
    import target

    old_class, old_method = target.Thing, vars(target.Thing)["method"]
    engine.activate([patch(), patch("Thing.method")])

    importlib.reload(target)

    assert target.compute(1) == 102
    assert target.Thing is not old_class
    assert target.Thing(1).method() == old_class(1).method() == 101
    engine.deactivate()
    assert target.compute(1) == 2
    assert target.Thing(1).method() == 1
    assert vars(old_class)["method"] is old_method


def test_module_imported_anew_is_patched_again(write_module: Write, engine: Engine) -> None:
    write_module(target=TARGET)
    engine.activate([patch()])
    importlib.import_module("target")
    del sys.modules["target"]

    assert importlib.import_module("target").compute(1) == 102


def test_import_that_fails_once_is_patched_when_it_succeeds(
    write_module: Write, engine: Engine
) -> None:
    write_module(target="raise RuntimeError('no device')")
    engine.activate([patch()])
    with pytest.raises(RuntimeError, match="no device"):
        importlib.import_module("target")
    assert states(engine) == {"compute": "waiting"}

    write_module(target=TARGET)

    assert importlib.import_module("target").compute(1) == 102


def test_activation_within_an_import_of_the_module_patches_it_when_it_is_complete(
    write_module: Write, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    monkeypatch.setattr(sys, "activate_now", lambda: engine.activate([patch()]), raising=False)
    write_module(target="import sys; sys.activate_now()\n" + inspect.cleandoc(TARGET), later="")
    import target

    assert states(engine) == {"compute": "applied"}
    assert target.compute(1) == 102


def test_half_imported_module_that_fails_is_not_patched(
    write_module: Write, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    monkeypatch.setattr(sys, "activate_now", lambda: engine.activate([patch()]), raising=False)
    write_module(target="import sys; sys.activate_now(); raise RuntimeError")
    with pytest.raises(RuntimeError):
        importlib.import_module("target")

    assert states(engine) == {"compute": "waiting"}


def test_circular_imports_are_patched(write_module: Write, engine: Engine) -> None:
    write_module(
        target=inspect.cleandoc(TARGET) + "\nimport friend",
        friend="import target\ndef call(value): return target.compute(value)",
    )
    engine.activate([patch()])

    import friend

    assert friend.call(1) == 102


def test_module_that_another_thread_is_importing_is_patched(
    write_module: Write, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "pause", lambda: (begun.set(), go_on.wait(30)), raising=False)
    write_module(target=inspect.cleandoc(TARGET) + "\nimport sys; sys.pause()")
    importer = threading.Thread(target=importlib.import_module, args=["target"])
    importer.start()
    assert begun.wait(30)
    activator = threading.Thread(target=engine.activate, args=[[patch()]])
    activator.start()
    # Whether the activation has come to wait by now or not, it has to end in the same state.
    time.sleep(0.05)
    go_on.set()
    importer.join(30)
    activator.join(30)

    assert not importer.is_alive()
    assert not activator.is_alive()
    assert sys.modules["target"].compute(1) == 102


def test_import_that_fails_in_another_thread_is_left_to_the_next_attempt(
    write_module: Write, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "pause", lambda: (begun.set(), go_on.wait(30)), raising=False)
    write_module(target="import sys; sys.pause(); raise RuntimeError('no device')")

    def fail() -> None:
        with pytest.raises(RuntimeError):
            importlib.import_module("target")

    importer = threading.Thread(target=fail)
    importer.start()
    assert begun.wait(30)
    activator = threading.Thread(target=engine.activate, args=[[patch()]])
    activator.start()
    time.sleep(0.05)
    go_on.set()
    importer.join(30)
    activator.join(30)
    assert states(engine) == {"compute": "waiting"}

    write_module(target=TARGET)
    assert importlib.import_module("target").compute(1) == 102


def test_many_threads_activating_deactivating_and_importing_leave_one_wrapper_or_none(
    write_module: Write, engine: Engine
) -> None:
    write_module(target=TARGET)
    for _ in range(20):
        sys.modules.pop("target", None)
        start = threading.Barrier(12)

        def act(number: int, start: threading.Barrier = start) -> None:
            start.wait(30)
            if number % 3 == 0:
                importlib.import_module("target")
            elif number % 3 == 1:
                engine.activate([patch()])
            else:
                (engine.activate([patch()]), engine.status())

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(act, range(12)))
        assert sys.modules["target"].compute(1) == 102
        engine.activate([])
        assert sum(finder is engine._watcher for finder in sys.meta_path) == 1
        engine.deactivate()
        assert sys.modules["target"].compute(1) == 2
        assert not any(finder is engine._watcher for finder in sys.meta_path)


@pytest.mark.parametrize("theirs_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("at", ["import", "once"])
def test_another_tool_that_patches_the_same_function(
    write_module: Write, engine: Engine, theirs_first: bool, at: str
) -> None:
    def theirs(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs) * 1000

    def patch_theirs(module: ModuleType) -> None:
        wrapt.wrap_function_wrapper(module, "compute", theirs)

    write_module(target=TARGET)
    if at == "once":
        importlib.import_module("target")
    steps = [
        lambda: wrapt.register_post_import_hook(patch_theirs, "target"),
        lambda: engine.activate([patch()]),
    ]
    for step in steps if theirs_first else reversed(steps):
        step()
    target = importlib.import_module("target")

    assert target.compute(1) in (2 * 1000 + 100, (2 + 100) * 1000)
    engine.activate([patch()])
    assert target.compute(1) in (2 * 1000 + 100, (2 + 100) * 1000)
    engine.deactivate()
    assert target.compute(1) == 2 * 1000


def test_wrapper_left_behind_under_another_tools_is_not_wrapped_again(
    write_module: Write, engine: Engine
) -> None:
    write_module(target=TARGET)
    import target

    original = target.compute
    engine.activate([patch()])
    ours = target.compute
    wrapt.wrap_function_wrapper("target", "compute", add_hundred)
    engine.deactivate()
    assert target.compute(1) == 102
    # The other tool goes as well, and gives back what it found.
    target.compute = ours
    assert target.compute(1) == 2

    engine.activate([patch()])
    assert target.compute(1) == 102
    engine.deactivate()
    assert target.compute is original


def test_function_taken_by_name_is_as_before_once_deactivated(
    write_module: Write, engine: Engine
) -> None:
    write_module(target=TARGET)
    engine.activate([patch()])
    from target import compute

    engine.deactivate()

    assert compute(1) == 2


def test_signature_name_and_documentation_stay(write_module: Write, engine: Engine) -> None:
    write_module(target=TARGET)
    import target

    original, signature = target.compute, inspect.signature(target.compute)
    engine.activate([patch()])

    assert target.compute.__wrapped__ is original
    assert inspect.signature(target.compute) == signature
    assert (target.compute.__name__, target.compute.__doc__) == ("compute", "Multiply.")
    assert target.compute.__module__ == "target"
    assert inspect.isfunction(target.compute)
    assert inspect.getsource(target.compute) == inspect.getsource(original)


def test_loader_of_a_patched_module_is_its_own(write_module: Write, engine: Engine) -> None:
    write_module(target=TARGET)
    engine.activate([patch()])
    import target

    assert type(target.__loader__) is importlib.machinery.SourceFileLoader
    assert target.__spec__.loader is target.__loader__


def test_functions_methods_classes_and_instances_can_be_pickled_and_copied(
    write_module: Write, engine: Engine
) -> None:
    write_module(target=TARGET)
    import target

    methods = [patch(f"Thing.{name}") for name in ("method", "halve")]
    engine.activate([patch(), *methods, patch("Thing.__init__", wrapper=passing)])
    thing = target.Thing(7)

    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):

        def again(value: Any, protocol: int = protocol) -> Any:
            return pickle.loads(pickle.dumps(value, protocol))

        assert again(target.compute) is target.compute
        assert again(target.Thing) is target.Thing
        assert again(target.Thing.method)(thing) == 107
        assert again(thing).size == 7
        assert again(thing.method)() == 107
        assert again(target.Thing.halve)(8) == 104
    assert copy.deepcopy(target.compute) is copy.copy(target.compute) is target.compute
    assert copy.deepcopy(target.Thing) is target.Thing
    method = copy.deepcopy({"method": thing.method, "thing": thing})
    assert method["method"]() == 107
    assert method["method"].__self__ is method["thing"] is not thing
    assert copy.copy(thing.method)() == 107


def passing(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attribute": "gone"}, "target has no gone"),
        ({"attribute": "Gone.method"}, "target has no Gone.method"),
        ({"attribute": "Thing.gone"}, "target has no Thing.gone"),
        ({"attribute": "CALLS"}, "target.CALLS cannot be called"),
        ({"find_incompatibility": lambda module: "it is another one"}, "it is another one"),
        ({"find_incompatibility": lambda module: 1 / 0}, "ZeroDivisionError: division by zero"),
        ({"is_native": lambda module: 1 / 0}, "ZeroDivisionError: division by zero"),
    ],
)
def test_seam_that_does_not_fit_is_left_alone_and_said_so(
    write_module: Write,
    engine: Engine,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    reason: str,
) -> None:
    write_module(target=TARGET)
    engine.activate([patch(**settings)])

    with caplog.at_level(logging.WARNING):
        import target

    assert target.compute(1) == 2
    (seam,) = engine.status()
    assert seam.state is State.INCOMPATIBLE
    assert re.search(reason, seam.reason)
    assert seam.reason in caplog.text
    assert engine.find_failed_seam([seam.seam]) == seam
    assert str(seam) == f"seam {seam.seam!r} (target.{seam.attribute}): {seam.reason}"
    caplog.clear()
    engine.activate([patch(**settings)])
    assert caplog.text == ""


def test_class_that_cannot_be_changed_is_incompatible(write_module: Write, engine: Engine) -> None:
    write_module(target="from fractions import Fraction\nThing = int")
    engine.activate([patch("Thing.bit_length")])
    importlib.import_module("target")

    assert states(engine) == {"Thing.bit_length": "incompatible"}


def test_native_feature_is_left_alone_and_counts(write_module: Write, engine: Engine) -> None:
    write_module(target=TARGET)
    engine.activate(
        [patch(is_native=lambda module: True, find_incompatibility=lambda module: "never asked")]
    )
    import target

    assert target.compute(1) == 2
    assert states(engine) == {"compute": "native"}
    assert engine.find_failed_seam(["compute"]) is None


def test_seam_that_no_patch_has_is_a_failed_one(engine: Engine) -> None:
    engine.activate([patch()])

    failure = engine.find_failed_seam(["compute", "convert"])
    assert failure is not None
    assert failure.state is State.ABSENT
    assert str(failure) == "seam 'convert': no active patch has this name"


def test_module_of_a_waiting_seam_is_loaded_only_when_told(
    write_module: Write, engine: Engine
) -> None:
    write_module(target=TARGET)
    engine.activate([patch()])

    assert engine.find_failed_seam(["compute"]) is None
    assert "target" not in sys.modules

    assert engine.find_failed_seam(["compute"], load=True) is None
    assert sys.modules["target"].compute(1) == 102


@pytest.mark.parametrize("source", [None, "raise RuntimeError('no device')"])
def test_module_that_cannot_be_loaded_is_incompatible_until_it_can(
    write_module: Write, engine: Engine, source: str | None
) -> None:
    if source is not None:
        write_module(target=source)
    engine.activate([patch()])

    failure = engine.find_failed_seam(["compute"], load=True)
    assert failure is not None
    assert failure.state is State.INCOMPATIBLE
    assert failure.reason.startswith("it cannot be imported: ")

    write_module(target=TARGET)
    assert importlib.import_module("target").compute(1) == 102
    assert engine.find_failed_seam(["compute"]) is None


def test_module_that_came_without_an_import_is_not_taken_for_patched(engine: Engine) -> None:
    engine.activate([patch()])
    sys.modules["target"] = ModuleType("target")
    try:
        failure = engine.find_failed_seam(["compute"])
        assert failure is not None
        assert "without being imported" in failure.reason
    finally:
        del sys.modules["target"]


def test_mentions_looks_into_nested_functions_and_through_wrappers() -> None:
    def outer(value: Any) -> Any:
        def inner() -> Any:
            return value["a_key"].an_attribute

        return inner

    wrapped = wrapt.FunctionWrapper(staticmethod(outer), passing)

    for name in ("a_key", "an_attribute", "value"):
        assert code.refers_to(wrapped, name)
    assert not code.refers_to(wrapped, "another")
    assert not code.refers_to(None, "value")
    assert not code.refers_to(len, "value")
