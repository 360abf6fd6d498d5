"""The names that NxDI gives a checkpoint's tensors before it fuses the experts.

Hugging Face's ``model.`` is gone, and ``.weight_scale`` is ``.scale``
(``models/application_base.py``, ``get_state_dict``).
"""

from __future__ import annotations


def in_state_dict(name: str) -> str:
    """The name in NxDI's state dict of a checkpoint's tensor."""
    return scale_in_state_dict(name.removeprefix("model."))


def scale_in_state_dict(name: str) -> str:
    """The name of a tensor with NxDI's for a scale."""
    is_scale = name.endswith(".weight_scale")
    return name.removesuffix("weight_scale") + "scale" if is_scale else name


def scale_of(weight: str) -> str:
    """The name of the scale of a weight, ``….weight``."""
    return weight.removesuffix("weight") + "scale"
