"""Patched functions that other modules refer to already: by a name of their own, or otherwise."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest

from nxdi_expertscale.hooking import references, wrapper
from nxdi_expertscale.hooking.engine import Engine
from nxdi_expertscale.hooking.patch import Patch, SeamStatus, State

Write = Callable[..., None]

TARGET = """
    def compute(value):
        return value * 2

    class Base:
        def inherited(self):
            return 'inherited'

    class Thing(Base):
        def __init__(self, size=1):
            self.size = size

        def method(self):
            return self.size

        @staticmethod
        def halve(value):
            return value // 2
"""


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.deactivate()


def patch(attribute: str = "compute", module: str = "target") -> Patch:
    def add_hundred(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs) + 100

    return Patch(seam=attribute, module=module, attribute=attribute, wrapper=add_hundred)


def status(engine: Engine) -> SeamStatus:
    (found,) = engine.status()
    return found


def test_name_that_a_module_took_before_activation_is_patched_until_deactivation(
    write_module: Write, engine: Engine
) -> None:
    write_module(target=TARGET, user="from target import compute as mine\ncall = lambda: mine(1)")
    import target
    import user

    original = target.compute
    engine.activate([patch()])
    assert user.call() == 102
    assert user.mine is target.compute
    assert status(engine).state is State.APPLIED

    engine.deactivate()
    assert user.mine is target.compute is original


def test_name_that_a_module_takes_afterwards_is_patched(
    write_module: Write, engine: Engine
) -> None:
    write_module(target=TARGET, user="from target import compute")
    importlib.import_module("target")
    engine.activate([patch()])

    assert importlib.import_module("user").compute(1) == 102


def test_name_that_a_module_took_from_an_earlier_activation_is_patched_again(
    write_module: Write, engine: Engine
) -> None:
    write_module(
        target=TARGET,
        user="import target\nfrom target import compute\ninit = target.Thing.method",
    )
    patches = [patch(), patch("Thing.method")]
    engine.activate(patches)
    import target
    import user

    engine.deactivate()
    assert (user.compute(1), user.init(target.Thing(1))) == (2, 1)

    engine.activate(patches)
    assert (user.compute(1), user.init(target.Thing(1))) == (102, 101)


def test_name_taken_in_a_circular_import_is_patched(write_module: Write, engine: Engine) -> None:
    write_module(
        target="def compute(value): return value * 2\nimport friend",
        friend="from target import compute",
    )
    engine.activate([patch()])
    importlib.import_module("target")

    assert sys.modules["friend"].compute(1) == 102


def test_name_of_a_method_is_patched_as_it_is_looked_up_in_its_class(
    write_module: Write, engine: Engine
) -> None:
    def show_instance(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs), instance

    write_module(
        target=TARGET, user="from target import Thing\nsize = Thing.method\nhalve = Thing.halve"
    )
    import target
    import user

    originals = (user.size, user.halve)
    engine.activate(
        [
            Patch(seam=name, module="target", attribute=f"Thing.{name}", wrapper=show_instance)
            for name in ("method", "halve")
        ]
    )
    thing = target.Thing(3)
    assert user.size(thing) == (3, thing)
    assert user.halve(6) == (3, None)

    engine.deactivate()
    assert (user.size, user.halve) == originals


def test_inherited_method_keeps_its_other_names(write_module: Write, engine: Engine) -> None:
    write_module(target=TARGET, user="from target import Base\nalias = Base.inherited")
    import target
    import user

    engine.activate([patch("Thing.inherited")])

    assert user.alias is target.Base.inherited
    assert user.alias(target.Base()) == "inherited"


def test_function_that_the_module_itself_has_imported_keeps_its_other_names(
    write_module: Write, engine: Engine
) -> None:
    write_module(
        home="def compute(value): return value * 2",
        target="from home import compute",
        user="from home import compute",
    )
    import home
    import target
    import user

    engine.activate([patch()])

    assert target.compute(1) == 102
    assert home.compute(1) == user.compute(1) == 2
    assert status(engine).state is State.APPLIED


def test_name_that_has_changed_since_it_was_found_is_left_alone(write_module: Write) -> None:
    write_module(target=TARGET, user="from target import compute")
    import target
    import user

    [found] = references.find_aliases([target.compute], [user])
    installation = wrapper.Installation(
        wrapper.find_place(target, "compute"),
        lambda wrapped, *_: wrapped(0),
        module="target",
        attribute="compute",
        is_in_force=lambda: True,
    )
    user.compute = theirs = lambda value: value - 1

    installation.replace_alias(found)

    assert user.compute is theirs


def test_name_that_another_tool_has_replaced_since_is_left_to_it(
    write_module: Write, engine: Engine
) -> None:
    write_module(target=TARGET, user="from target import compute")
    importlib.import_module("target")
    user = importlib.import_module("user")
    engine.activate([patch()])
    user.compute = theirs = lambda value: value - 1  # type: ignore[attr-defined]

    engine.deactivate()

    assert user.compute is theirs  # type: ignore[attr-defined]


HOLDERS = {
    "call": "def call(value, compute=compute): return compute(value)\ndel compute",
    "by_name": "def by_name(value, *, compute=compute): return compute(value)\ndel compute",
    "partly": "import functools\npartly = functools.partial(compute, 1)\ndel compute",
    "cached": "import functools\ncached = functools.lru_cache(compute)\ndel compute",
    "REGISTRY": "REGISTRY = {'compute': [compute]}\ndel compute",
    "Model.convert": "class Model:\n    convert = staticmethod(compute)\ndel compute",
    "Model.plain": "class Model:\n    plain = compute\ndel compute",
    "closed": (
        "def make(compute):\n    def closed(value): return compute(value)\n    return closed\n"
        "closed = make(compute)\ndel compute"
    ),
    "Model.deep": (
        "import functools\nclass Model:\n    @staticmethod\n"
        "    def deep(value, call=functools.partial(compute)): return call(value)\ndel compute"
    ),
}


@pytest.mark.parametrize("variable", HOLDERS)
def test_what_cannot_be_patched_is_named_until_its_module_is_loaded_again(
    write_module: Write, engine: Engine, caplog: pytest.LogCaptureFixture, variable: str
) -> None:
    write_module(target=TARGET, user=f"from target import compute\n{HOLDERS[variable]}")
    user = importlib.import_module("user")

    engine.activate([patch()])

    found = status(engine)
    assert found.state is State.PARTIAL
    assert found.reason == (
        f"user.{variable} holds the function as it was before it was patched, because user was "
        "imported before"
    )
    assert engine.find_failed_seam(["compute"]) == found
    assert caplog.record_tuples == [
        (
            "nxdi_expertscale.hooking.engine",
            logging.WARNING,
            f"target.compute is patched, but {found.reason}",
        )
    ]

    importlib.reload(user)
    assert status(engine).state is State.APPLIED
    assert engine.find_failed_seam(["compute"]) is None


def test_holder_in_the_patched_module_itself_is_named(write_module: Write, engine: Engine) -> None:
    write_module(target="def compute(value): return value\nTABLE = {'compute': compute}")
    engine.activate([patch()])
    importlib.import_module("target")

    assert status(engine).state is State.PARTIAL
    assert "target.TABLE" in status(engine).reason


def test_holder_of_the_patched_function_is_no_fault(write_module: Write, engine: Engine) -> None:
    write_module(target=TARGET, user="from target import compute\nTABLE = {'compute': compute}")
    engine.activate([patch()])
    user = importlib.import_module("user")
    engine.activate([patch()])

    assert user.TABLE["compute"](1) == 102
    assert status(engine).state is State.APPLIED


def test_no_code_of_other_modules_runs_while_they_are_looked_through(
    write_module: Write, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(ModuleType):
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"asked for {name}")

        def __setattr__(self, name: str, value: Any) -> None:
            raise AssertionError(f"told to set {name}")

        @property
        def __dict__(self) -> Any:
            raise AssertionError("asked for its variables")

    class Pretender:
        @property
        def __class__(self) -> Any:
            raise AssertionError("asked for its class")

        @__class__.setter
        def __class__(self, value: Any) -> None:
            raise NotImplementedError

    class Meta(type):
        def __getattribute__(cls, name: str) -> Any:
            raise AssertionError(f"asked for {name}")

        @property
        def __dict__(cls) -> Any:
            raise AssertionError("asked for its attributes")

    class Unequal:
        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        __hash__ = None  # type: ignore[assignment]

    odd = Odd("odd")
    ModuleType.__setattr__(odd, "kind", Meta("Kind", (), {"__module__": "odd"}))
    write_module(target=TARGET, lazy="raise AssertionError('loaded')")
    target = importlib.import_module("target")
    original = target.compute
    ModuleType.__setattr__(odd, "alias", original)
    ModuleType.__setattr__(odd, "unequal", [Unequal(), Pretender()])
    spec = importlib.util.find_spec("lazy")
    assert spec is not None
    assert spec.loader is not None
    lazy = importlib.util.module_from_spec(spec)
    importlib.util.LazyLoader(spec.loader).exec_module(lazy)
    modules = {"odd": odd, "lazy": lazy, "pretender": Pretender(), "nothing": None}
    with monkeypatch.context() as patched:
        for name, module in modules.items():
            patched.setitem(sys.modules, name, module)  # type: ignore[arg-type]

        engine.activate([patch()])

    alias = vars(ModuleType)["__dict__"].__get__(odd)
    assert target.compute(1) == alias["alias"](1) == 102
    assert status(engine).state is State.APPLIED
    engine.deactivate()
    assert alias["alias"] is original


def test_names_taken_while_many_threads_import_and_activate_are_patched(
    write_module: Write, engine: Engine
) -> None:
    users = [f"user{number}" for number in range(8)]
    write_module(target=TARGET, **dict.fromkeys(users, "from target import compute"))
    for _ in range(10):
        for name in ("target", *users):
            sys.modules.pop(name, None)
        importlib.import_module("target")
        start = threading.Barrier(len(users) + 1)

        def act(name: str, start: threading.Barrier = start) -> None:
            start.wait(30)
            if name:
                importlib.import_module(name)
            else:
                engine.activate([patch()])

        with ThreadPoolExecutor(len(users) + 1) as pool:
            list(pool.map(act, ["", *users]))
        assert [sys.modules[name].compute(1) for name in users] == [102] * len(users)
        engine.deactivate()
        assert [sys.modules[name].compute(1) for name in users] == [2] * len(users)
