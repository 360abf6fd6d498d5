"""Quantized layers into a model, in the place of float ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from torch import nn

from neuronx_distributed.quantization.quantization_config import get_default_custom_qconfig_dict
from neuronx_distributed.quantization.quantization_mappings import (
    get_default_quant_module_mappings,
)


def convert(
    module: nn.Module,
    q_config: Mapping[str, Any] | None = None,
    inplace: bool = False,
    mapping: Mapping[type, Any] | None = None,
    include: Sequence[str] | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
) -> nn.Module:
    """Replace the layers that ``mapping`` names.

    Args:
        include: Patterns (fnmatch) of module names. A layer that matches is replaced, and in any
            other module that matches every layer is.
        modules_to_not_convert: A layer is left alone whose dotted path contains one of these.
    """
    assert include is None or modules_to_not_convert is None, (
        "Either include and modules_to_not_convert both should be None, or only one of them "
        f"should be not-None, not both. Provided values include: {include} , "
        f"modules_to_not_convert: {modules_to_not_convert}"
    )
    module = module if inplace else copy.deepcopy(module)
    q_config = get_default_custom_qconfig_dict() if q_config is None else q_config
    mapping = get_default_quant_module_mappings() if mapping is None else mapping
    if include is None:
        _replace_within(module, q_config, mapping, modules_to_not_convert or [])
        return module
    for name, child in module.named_modules():
        if not any(fnmatch(name, pattern) for pattern in include):
            continue
        if type(child) in mapping:
            parent, _, last = name.rpartition(".")
            quantized = mapping[type(child)].from_float(mod=child, q_config=q_config)
            setattr(module.get_submodule(parent), last, quantized)
        else:
            _replace_within(child, q_config, mapping, [])
    return module


def _replace_within(
    module: nn.Module,
    q_config: Mapping[str, Any],
    mapping: Mapping[type, Any],
    skipped: Sequence[str],
    path: str = "",
) -> None:
    for name, child in list(module.named_children()):
        child_path = f"{path}.{name}" if path else name
        if type(child) not in mapping:
            _replace_within(child, q_config, mapping, skipped, child_path)
        elif not any(part in child_path for part in skipped):
            setattr(module, name, mapping[type(child)].from_float(mod=child, q_config=q_config))
