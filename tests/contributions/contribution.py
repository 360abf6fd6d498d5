"""What is to be known of a contributed model to run a tiny one of its kind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nxdi_expertscale.testing.running import MakeConfig
from tests.contributions.tiny import BLOCK, Tiny, in_blocks

RELEASES = ("0.8", "0.9")
"""The releases on which contributions are run."""

_KEPT_IN_BLOCKS = ("embed", "lm_head", "eh_proj", "gate.weight", "norm")
"""What is in full precision in a checkpoint that is published as block FP8."""


@dataclass(frozen=True)
class Contribution:
    """A contributed model.

    Attributes:
        name: What people call the model.
        ref: The commit or pull request of NxDI's repository that has it.
        path: Its folder there.
        root: Where its modules are imported from, within that folder.
        application: ``"module:Class"``.
        config_cls: ``"module:Class"`` of its config, where the application does not say.
        config: Fields of the ``config.json`` of a tiny model.
        write: Makes the weights of a tiny model under their published names.
        blocks: Whether the model is published as block FP8.
        settings: Keywords of the neuron config that its README has, and this one needs.
        make_config: Makes its config, where the class cannot from a folder alone.
        prepare: Puts in what it has for the device alone, or for quantized models alone.
        kept_in_blocks: Further parts of names of what block FP8 leaves in full precision.
        releases: The releases of NxDI that it runs on.
    """

    name: str
    ref: str
    path: str
    application: str
    config: Mapping[str, Any]
    write: Callable[[Tiny], None]
    config_cls: str | None = None
    root: str = "src"
    blocks: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    make_config: MakeConfig | None = None
    prepare: Callable[[], None] = lambda: None
    kept_in_blocks: tuple[str, ...] = ()
    releases: tuple[str, ...] = RELEASES

    @property
    def key(self) -> str:
        """Its name as a folder's."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def save(self, folder: Path) -> Path:
        """Write a tiny model as it is published."""
        tiny = Tiny()
        self.write(tiny)
        tensors, config = tiny.tensors, dict(self.config)
        if self.blocks:
            tensors = in_blocks(tensors, list(filter(self._is_in_blocks, tensors)))
            scheme = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
            config["quantization_config"] = scheme
        _save(folder, tensors, config)
        return folder

    def _is_in_blocks(self, name: str) -> bool:
        kept = (*_KEPT_IN_BLOCKS, *self.kept_in_blocks)
        return name.endswith(".weight") and not any(part in name for part in kept)


def _save(folder: Path, tensors: dict[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # With an index, as every large model is: some contributions read no other.
    file = "model-00001-of-00001.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
