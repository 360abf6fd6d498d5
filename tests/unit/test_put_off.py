"""Weights whose copy is put off: what any converter makes of them is what torch would make."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from nxdi_expertscale import IncompatibleUpstreamError
from nxdi_expertscale.families.built_in import QWEN3_MOE
from nxdi_expertscale.loading import put_off
from nxdi_expertscale.loading.put_off import PutOffCopy, convert_in_one_pass

KEY = "layers.0.mlp.experts.0.gate_proj.weight"
OUT, INPUTS = 6, 8


def weight() -> torch.Tensor:
    return torch.arange(OUT * INPUTS, dtype=torch.bfloat16).view(OUT, INPUTS)


def filled(fill: Callable[[torch.Tensor], object]) -> torch.Tensor:
    fused = torch.zeros(2, INPUTS, 2 * OUT, dtype=torch.bfloat16)
    fill(fused)
    return fused


def copy_to_part(tensor: torch.Tensor) -> torch.Tensor:
    return filled(lambda fused: fused.narrow(0, 1, 1).narrow(2, 0, OUT).copy_(tensor))


def assign_to_part(tensor: torch.Tensor) -> torch.Tensor:
    return filled(lambda fused: fused.__setitem__((1, slice(None), slice(OUT, None)), tensor))


IN_ONE_PASS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as NxDI": lambda w: copy_to_part(w.T.detach().clone()),
    "without detaching": lambda w: copy_to_part(w.T.clone()),
    "without a copy": lambda w: copy_to_part(w.T),
    "by functions": lambda w: copy_to_part(torch.clone(torch.t(w))),
    "detached first": lambda w: copy_to_part(w.detach().t().clone()),
    "assigned": lambda w: assign_to_part(w.T),
    "assigned copy": lambda w: assign_to_part(w.T.detach().clone()),
}

OTHERWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "stacked": lambda w: torch.stack([w.T, w.T.clone()]),
    "concatenated": lambda w: torch.cat([w.clone(), w], dim=1),
    "in another dtype": lambda w: w.T.to(torch.float32),
    "copied to another dtype": lambda w: torch.zeros(INPUTS, OUT).copy_(w.T.clone()),
    "broadcast": lambda w: torch.zeros(3, INPUTS, OUT, dtype=w.dtype).copy_(w.T),
    "not transposed": lambda w: torch.zeros(OUT, INPUTS, dtype=w.dtype).copy_(w),
    "transposed twice": lambda w: w.T.T.contiguous(),
    "copied in a format": lambda w: w.T.clone(memory_format=torch.contiguous_format),
    "copied later": lambda w: torch.zeros(INPUTS, OUT, dtype=w.dtype).copy_(w.T, True),
    "changed in place": lambda w: w.T.clone().mul_(2),
    "part of it": lambda w: w.T.clone()[2:5],
    "by a list": lambda w: filled(
        lambda f: f.__setitem__(([1], slice(None), slice(0, OUT)), w.T[None])
    ),
    "copy of a copy": lambda w: copy_to_part(w.T.clone().clone()),
    "view of a copy": lambda w: copy_to_part(w.clone().T),
    "transposed by axes": lambda w: w.transpose(0, 1).contiguous(),
    "by numbers": lambda w: torch.tensor(w.T.tolist()),
}


@pytest.fixture
def in_one_pass(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what has been copied and transposed in one pass."""
    found: list[tuple[int, ...]] = []
    copy = put_off.copy_transposed

    def noting(weight: torch.Tensor, out: torch.Tensor) -> None:
        found.append(tuple(weight.shape))
        copy(weight, out)

    monkeypatch.setattr(put_off, "copy_transposed", noting)
    return found


@pytest.mark.parametrize("make", IN_ONE_PASS.values(), ids=IN_ONE_PASS)
def test_copies_are_made_in_one_pass(
    make: Callable[[torch.Tensor], torch.Tensor], in_one_pass: list[tuple[int, ...]]
) -> None:
    found = make(PutOffCopy.of(weight()))

    assert type(found) is torch.Tensor
    assert torch.equal(found, make(weight()))
    assert in_one_pass == [(OUT, INPUTS)]


@pytest.mark.parametrize("make", OTHERWISE.values(), ids=OTHERWISE)
def test_whatever_else_is_done_is_done_by_torch(
    make: Callable[[torch.Tensor], torch.Tensor], in_one_pass: list[tuple[int, ...]]
) -> None:
    found, expected = make(PutOffCopy.of(weight())), make(weight())

    assert type(found) is torch.Tensor
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    assert torch.equal(found, expected)
    assert in_one_pass == []


def test_weight_looks_like_itself() -> None:
    for make in (lambda w: w, lambda w: w.T, lambda w: w.T.clone()):
        found, expected = make(PutOffCopy.of(weight())), make(weight())
        assert (found.shape, found.dtype, found.device) == (
            expected.shape,
            expected.dtype,
            expected.device,
        )
        assert (found.size(0), found.dim(), found.numel()) == (
            expected.size(0),
            expected.dim(),
            expected.numel(),
        )
        assert found.stride() == expected.stride()


def test_copy_that_is_changed_is_apart_from_its_weight() -> None:
    original = weight()
    copy = PutOffCopy.of(original).T.clone()

    copy.add_(1)

    assert torch.equal(copy_to_part(copy), copy_to_part(weight().T + 1))
    assert torch.equal(original, weight())


def test_weight_that_is_changed_after_it_was_copied_is_refused() -> None:
    put_off_weight = PutOffCopy.of(weight())
    copy = put_off_weight.T.clone()
    put_off_weight.zero_()

    with pytest.raises(IncompatibleUpstreamError, match=f"set {put_off.VARIABLE}=0"):
        copy_to_part(copy)


def test_what_a_converter_leaves_is_plain() -> None:
    state_dict = {KEY: weight(), "norm.weight": torch.ones(3)}
    before = dict(state_dict)

    converted = convert_in_one_pass(
        lambda: {**state_dict, "copy": state_dict[KEY].T.clone()}, state_dict, QWEN3_MOE
    )

    assert state_dict == before
    assert {type(tensor) for tensor in converted.values()} == {torch.Tensor}
    assert torch.equal(converted["copy"], weight().T)


def test_state_dict_is_as_before_after_an_error() -> None:
    state_dict = {KEY: weight()}
    before = dict(state_dict)

    def fail() -> dict[str, torch.Tensor]:
        assert isinstance(state_dict[KEY], PutOffCopy)
        raise RuntimeError("the converter failed")

    with pytest.raises(RuntimeError, match="the converter failed"):
        convert_in_one_pass(fail, state_dict, QWEN3_MOE)
    assert state_dict[KEY] is before[KEY]


def test_nothing_is_put_off_when_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(put_off.VARIABLE, "0")
    state_dict = {KEY: weight()}
    seen: list[torch.Tensor] = []

    def convert() -> dict[str, torch.Tensor]:
        seen.append(state_dict[KEY])
        return state_dict

    convert_in_one_pass(convert, state_dict, QWEN3_MOE)

    assert [type(tensor) for tensor in seen] == [torch.Tensor]


READ_BY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **IN_ONE_PASS,
    **OTHERWISE,
    "nothing": lambda w: torch.zeros(0),
}


@pytest.mark.parametrize("is_on", [True, False], ids=["put off", "turned off"])
@pytest.mark.parametrize("read", READ_BY.values(), ids=READ_BY)
def test_samplers_see_what_the_converter_reads(
    read: Callable[[torch.Tensor], torch.Tensor], is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(put_off.VARIABLE, str(int(is_on)))
    state_dict, seen = {KEY: weight()}, []

    convert_in_one_pass(
        lambda: {"converted": read(state_dict[KEY])},
        state_dict,
        QWEN3_MOE,
        {KEY: lambda transposed: seen.append(transposed.clone())},
    )

    assert seen
    assert all(torch.equal(transposed, weight().T) for transposed in seen)


def test_samplers_see_a_weight_as_it_was_before_the_converter_changes_it() -> None:
    state_dict, seen = {KEY: weight()}, []

    def change() -> dict[str, torch.Tensor]:
        state_dict[KEY].mul_(2)
        return state_dict

    sampler = {KEY: lambda transposed: seen.append(transposed.clone())}
    convert_in_one_pass(change, state_dict, QWEN3_MOE, sampler)

    assert torch.equal(seen[0], weight().T)


def test_weights_that_are_not_put_off_are_sampled_before_they_are_converted() -> None:
    state_dict, seen = {KEY: weight().requires_grad_()}, []

    def convert() -> dict[str, torch.Tensor]:
        assert seen
        return {}

    convert_in_one_pass(convert, state_dict, QWEN3_MOE, {KEY: seen.append})

    assert torch.equal(seen[0], weight().T)


class Cycle:
    """Garbage that only a search finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    before = gc.get_freeze_count()
    gc.unfreeze()
    yield
    if before:
        gc.freeze()


def convert_after_garbage() -> tuple[bool, bool]:
    """Whether a search finds garbage of before a conversion, and of during it."""
    old = weakref.ref(Cycle())
    new = []

    def convert() -> dict[str, torch.Tensor]:
        new.append(weakref.ref(Cycle()))
        gc.collect()
        return {}

    gc.disable()
    try:
        convert_in_one_pass(convert, {}, QWEN3_MOE)
    finally:
        gc.enable()
    return old() is None, new[0]() is None


def test_older_objects_are_not_searched_while_converting(nothing_frozen: None) -> None:
    assert convert_after_garbage() == (False, True)
    assert gc.get_freeze_count() == 0


def test_objects_that_a_process_keeps_out_stay_out(nothing_frozen: None) -> None:
    gc.freeze()
    count = gc.get_freeze_count()

    assert convert_after_garbage() == (True, True)
    assert gc.get_freeze_count() == count
    gc.unfreeze()
