"""Weights that lie in a finished folder and are no part of its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from nxdi_expertscale.checkpoint.write.manifest import Manifest

STRAY_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.pt",
    "*.pth",
    "adapter_config.json",
)
"""What NxDI, transformers or vLLM may load in place of what the index names, or on top of it.

NxDI (``modules/checkpoint.py``, ``load_state_dict``) takes ``model.safetensors`` and
``diffusion_pytorch_model.safetensors`` before the index; transformers takes ``model.safetensors``,
and an adapter where there is one; vLLM takes whatever matches its load format.
"""


def find_stray_weights(names: Iterable[str], manifest: Manifest) -> list[str]:
    """Find weights in a folder that are no part of its checkpoint.

    Args:
        names: The names of everything in the folder.
        manifest: The folder's manifest.
    """
    own = {record.name for record in (*manifest.shards, *manifest.files)}
    return [
        name
        for name in names
        if name not in own and any(fnmatchcase(name.lower(), kind) for kind in STRAY_WEIGHTS)
    ]
