"""Whether a state dict fills a model: each tensor reaches the parameter that it was made for.

A state dict here has the names of the model's own parameters, and its tensors are whole: they have
not been cut for the ranks yet.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nxdi_expertscale.numerics import fp8

StateDict = Mapping[str, torch.Tensor]

_STATES = frozenset({"kv_mgr", "past_key_values", "hidden_state_rolling_buffer"})
"""Parts of the paths of what a model writes itself: caches (``modules/kvcache`` of NxDI), EAGLE's
hidden states (``modules/eagle``)."""

_RANK = "rank"
"""Last part of the name of a rank's own number (NxD's ``SPMDRank``)."""

_NO_WEIGHTS = frozenset({"inv_freq", "input_scale", "k_scale", "v_scale"})
"""Last parts of names in a checkpoint that no weight depends on: frequencies that a model computes
itself, scales of activations and of caches."""

_LORA, _BASE_LAYER = "lora_", ".base_layer."
"""What NxDI adds to a model with adapters, and where it puts the layers that they adapt. It renames
the tensors after the preshard hooks (``trace/trace.py`` of NxD, ``preprocess_checkpoint``)."""

_PARTS = ("draft_model", "target_model")
"""The two models of fused speculation, within the one that holds them."""

_SCALE_NAMES = frozenset({"scale", "weight_scale", "weight_scale_inv"})

_SETTINGS = (
    "set modules_to_not_convert to what the checkpoint was made with ('nxdi-expertscale "
    "neuron-config' prints it)"
)

_MAKE_IT_AGAIN = "make the checkpoint again with 'nxdi-expertscale quantize'"

_SHOWN = 4
"""Kinds of further faults that are named."""


@dataclass(frozen=True)
class Fault:
    """A tensor that does not reach a parameter, or a parameter that gets none.

    Attributes:
        name: Of the tensor or parameter.
        problem: What is wrong with it, to be read after its name.
        remedy: What to do.
    """

    name: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}; {self.remedy}"


def find_faults(
    model: nn.Module, state_dict: StateDict, states: Collection[torch.Tensor] = ()
) -> list[Fault]:
    """Compare a state dict with the model that it is about to be loaded into.

    A quantized tensor has to reach a parameter of its dtype that has a scale, a scale the module
    that applies it, and every parameter has to get a tensor of its shape, but for caches and ranks.
    Tensors of what the model does not have at all (a vision tower, layers that predict further
    tokens) are not its concern. Values are not looked at: tensors may be on the device ``meta``.

    Args:
        model: The model as one rank has it, its modules quantized. Parameters of NxD say
            themselves how they are cut (``tensor_model_parallel``, ``partition_dim``,
            ``num_partitions``, ``expert_model_parallel``).
        state_dict: The tensors after the model's preshard hooks, whole.
        states: Parameters that the model writes itself, beside caches.

    Returns:
        What is wrong, the worst first; nothing where the state dict fills the model.
    """
    parameters = {
        name.replace(_BASE_LAYER, "."): parameter
        for name, parameter in model.state_dict(keep_vars=True).items()
        if _LORA not in name
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    own = {id(state) for state in states}
    needed = {
        name: parameter
        for name, parameter in parameters.items()
        if not _is_state(name) and id(parameter) not in own
    }
    return [
        *_wrong_dtypes(needed, state_dict, modules),
        *_unfilled(needed, parameters, state_dict, modules),
        *_wrong_shapes(needed, state_dict, modules),
        *_left_over(parameters, state_dict, modules),
    ]


def describe(faults: Collection[Fault]) -> str:
    """One line for all faults: the first in full, and how many of which there are beside it."""
    first, *others = faults
    if not others:
        return str(first)
    counts: dict[str, list[str]] = defaultdict(list)
    for fault in others:
        counts[re.sub(r"\d+", "*", fault.name)].append(fault.name)
    beside = [
        names[0] if len(names) == 1 else f"{len(names)} like {names[0]}"
        for names in counts.values()
    ]
    shown, rest = beside[:_SHOWN], len(beside) - _SHOWN
    return f"{first} (also: {', '.join(shown)}{f' and {rest} more kinds' if rest > 0 else ''})"


def _is_state(name: str) -> bool:
    path = name.split(".")
    return path[-1] == _RANK or not _STATES.isdisjoint(path)


def _wrong_dtypes(
    needed: Mapping[str, torch.Tensor], state_dict: StateDict, modules: Mapping[str, nn.Module]
) -> Iterator[Fault]:
    """Quantized tensors where numbers are expected, and the reverse."""
    for name, parameter in needed.items():
        tensor = state_dict.get(name)
        if tensor is None or tensor.dtype == parameter.dtype:
            continue
        kind = _kind_of_module(name, modules)
        if fp8.is_quantized(parameter):
            yield Fault(
                name,
                f"it is {tensor.dtype}, and its module ({kind}) is one of {parameter.dtype}",
                _SETTINGS,
            )
        elif fp8.is_quantized(tensor):
            yield Fault(
                name,
                f"it is {tensor.dtype}, and its module ({kind}) reads that as plain numbers, "
                "without a scale: NxDI has not converted it",
                "keep it in full precision: quantize the checkpoint with --modules-to-not-convert "
                f"{_last_module(name)}, and {_SETTINGS}",
            )


def _unfilled(
    needed: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    state_dict: StateDict,
    modules: Mapping[str, nn.Module],
) -> Iterator[Fault]:
    """Parameters that would stay as they were initialised."""
    # One parameter may have several names: the experts of fused token generation, tied weights.
    filled = {id(parameter) for name, parameter in parameters.items() if name in state_dict}
    unused = [name for name in state_dict if name not in parameters]
    for name, parameter in needed.items():
        if id(parameter) in filled:
            continue
        filled.add(id(parameter))
        path, _, last = name.rpartition(".")
        near = difflib.get_close_matches(name, unused, n=1, cutoff=0.8)
        instead = f" (there is {near[0]})" if near else ""
        if last == "scale":
            yield Fault(
                name,
                f"missing{instead}, and its module ({_kind_of_module(name, modules)}) cannot read "
                f"{path}.weight without it",
                f"{_MAKE_IT_AGAIN}, or {_SETTINGS}",
            )
        else:
            yield Fault(
                name,
                f"missing{instead}: the model has this parameter, and would run with what it was "
                "initialised with",
                "make or download the checkpoint again if it lacks the tensor; otherwise NxDI's "
                "converter for this model drops or misnames it, and the model cannot be loaded "
                "with it",
            )


def _wrong_shapes(
    needed: Mapping[str, torch.Tensor], state_dict: StateDict, modules: Mapping[str, nn.Module]
) -> Iterator[Fault]:
    for name, parameter in needed.items():
        tensor = state_dict.get(name)
        if tensor is None or _fits(tensor, parameter):
            continue
        yield Fault(
            name,
            f"its shape is {list(tensor.shape)}, and its module ({_kind_of_module(name, modules)}) "
            f"takes {_whole_shape(parameter)}",
            _MAKE_IT_AGAIN
            if name.endswith(".scale")
            else "the checkpoint's config.json and its tensors belong to different models, or the "
            "checkpoint is damaged: make or download it again",
        )


def _fits(tensor: torch.Tensor, parameter: Any) -> bool:
    # NxD's shard_children cuts the first axis by experts, then the partition axis by ranks.
    expected, found = _whole_shape(parameter), list(tensor.shape)
    if hasattr(parameter, "expert_model_parallel") and len(found) == len(expected):
        return found[0] % expected[0] == 0 and found[1:] == expected[1:]
    return found == expected


def _whole_shape(parameter: Any) -> list[int]:
    """The shape of the tensor of which a rank's parameter holds a part."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= parameter.num_partitions
    return shape


def _left_over(
    parameters: Mapping[str, torch.Tensor], state_dict: StateDict, modules: Mapping[str, nn.Module]
) -> Iterator[Fault]:
    """Tensors that belong to one of the model's modules, and that no parameter takes."""
    takers: dict[str, list[str]] = defaultdict(list)
    for name in parameters:
        takers[_tail(name)].append(name)
    beside: dict[str, list[str]] = defaultdict(list)
    for name in parameters.keys() & state_dict.keys():
        beside[_above(name)].append(name)
    for name, tensor in state_dict.items():
        last = name.rpartition(".")[2]
        if name in parameters or last in _NO_WEIGHTS or last == _RANK:
            continue
        owner = _owner(name, modules)
        if owner is None or _is_copied(name, takers):
            continue
        if _take_renamed(tensor, beside[_above(name)], state_dict):
            continue
        if last in _SCALE_NAMES:
            problem = "no module applies this scale"
        elif fp8.is_quantized(tensor):
            problem = f"it is {tensor.dtype}, and no module takes it"
        else:
            problem = "no module takes it, and the model would compute without it"
        yield Fault(
            name,
            f"{problem} ({owner} is a {type(modules[owner]).__name__})",
            "NxDI's converter for this model drops or misnames it, or its modules lack what this "
            "checkpoint has: the model cannot be loaded with this release of NxDI",
        )


def _is_copied(name: str, takers: Mapping[str, Collection[str]]) -> bool:
    """Whether a preshard hook has copied a tensor one module deeper, as attention's do.

    NxDI's ``modules/attention/gqa.py`` makes ``self_attn.qkv_proj.q_proj.weight`` of
    ``self_attn.q_proj.weight``, and leaves the latter where it is.
    """
    above = _above(name)
    return above != "" and any(taker.startswith(above) for taker in takers.get(_tail(name), ()))


def _take_renamed(tensor: torch.Tensor, beside: list[str], state_dict: StateDict) -> bool:
    """Whether a converter has copied a tensor to another name beside it, and left it there.

    NxDI's Qwen3 makes ``self_attn.k_layernorm.weight`` of ``self_attn.k_norm.weight``. A copy
    stands for one tensor, and is taken from ``beside``.
    """
    if fp8.is_quantized(tensor):
        return False
    for name in beside:
        copy = state_dict[name]
        same = (copy.dtype, copy.shape, copy.device) == (tensor.dtype, tensor.shape, tensor.device)
        if same and (tensor.is_meta or torch.equal(copy, tensor)):
            beside.remove(name)
            return True
    return False


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _above(name: str) -> str:
    return name.removesuffix(_tail(name))


def _owner(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The innermost module that a tensor's name lies in; None if the model has none but itself."""
    path = name.rpartition(".")[0]
    while path and path not in modules:
        path = path.rpartition(".")[0]
    outer = isinstance(modules.get(path), nn.ModuleList | nn.ModuleDict)
    return None if path in ("", *_PARTS) or outer else path


def _kind_of_module(name: str, modules: Mapping[str, nn.Module]) -> str:
    module = modules.get(name.rpartition(".")[0])
    return type(module).__name__ if module is not None else "module"


def _last_module(name: str) -> str:
    return name.split(".")[-2] if "." in name else name
