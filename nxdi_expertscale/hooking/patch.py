"""A patch of one upstream function, and what became of it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from nxdi_expertscale.hooking.wrapper import Wrapper


@dataclass(frozen=True)
class Patch:
    """One upstream function, and what is wrapped around it.

    Attributes:
        seam: Name of the seam in messages, such as ``config`` or ``state_dict:qwen3_moe``.
        module: Upstream module that holds it; the patch is applied when it is imported. With
            ``*.`` before it, the end of the module's name: a file that may be in any package.
        attribute: Dotted name within the module, such as ``MoENeuronConfig.__init__``.
        wrapper: What is called in its place: a wrapt wrapper,
            ``(wrapped, instance, args, kwargs)``.
        find_incompatibility: Gives the reason why a module's seam is not the one that the patch
            knows, or None where it is. That the attribute exists and can be called is checked
            before.
        is_native: Whether a module has the feature at this seam already.
    """

    seam: str
    module: str
    attribute: str
    wrapper: Wrapper
    find_incompatibility: Callable[[ModuleType], str | None] = lambda _module: None
    is_native: Callable[[ModuleType], bool] = lambda _module: False


class State(str, enum.Enum):
    """What became of a patch."""

    WAITING = "waiting"
    """The module is not imported yet."""
    APPLIED = "applied"
    NATIVE = "native"
    """Upstream has the feature itself; the patch stands aside."""
    PARTIAL = "partial"
    """It is applied, but some code goes on with the function as it was before: the reason says
    which."""
    INCOMPATIBLE = "incompatible"
    """The seam is not the one that the patch knows; the reason says how it differs."""
    ABSENT = "absent"
    """No active patch has the seam's name."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class SeamStatus:
    """The state of one seam.

    Attributes:
        seam: Its name.
        module: Upstream module that holds it; with ``*.`` before it, a file of any package that
            is not imported yet.
        attribute: Its dotted name within the module.
        state: What became of the patch.
        reason: Why it is native, partial, incompatible or absent, or what it waits for, where
            that is not its module alone.
    """

    seam: str
    module: str
    attribute: str
    state: State
    reason: str = ""

    def __str__(self) -> str:
        place = f" ({self.module}.{self.attribute})" if self.module else ""
        return f"seam {self.seam!r}{place}: {self.reason or self.state}"
