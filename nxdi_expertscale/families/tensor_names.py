"""Reads the place of a tensor or module, its layer and expert, from its dotted name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from nxdi_expertscale.families.linears import RenamedLinear

_NUMBER = "(?:0|[1-9][0-9]{0,8})"
"""A number as models write it: ASCII, without leading zeros, and not of a million digits."""


@dataclass(frozen=True)
class ExpertTensor:
    """The place of one expert's tensor, read from its name in a checkpoint."""

    layer: int
    expert: int
    projection: str
    """The family's own name of the projection: ``gate_proj``, ``w1``, …"""
    suffix: str
    """What follows the projection: ``weight``, ``scale``, ``weight_scale``, …"""


@dataclass(frozen=True)
class LinearPlace:
    """The place of a linear layer that is renamed, read from its path.

    Attributes:
        layer: The layer's number.
        linears: What it is; several where NxDI fuses them.
    """

    layer: int
    linears: tuple[RenamedLinear, ...]


class TensorNames:
    """Reads the names of one family, in checkpoints and among NxDI's modules."""

    def __init__(
        self,
        *,
        experts: str,
        router: str,
        expert_mlps: str,
        projections: Iterable[str],
        stacked: Collection[str],
        prefixes: Iterable[str],
        linears: Iterable[RenamedLinear] = (),
        renames: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Make a reader from a family's paths, each with ``{layer}`` for the layer's number.

        Args:
            experts: Path of a layer's experts in a checkpoint.
            router: Path of a layer's router in a checkpoint.
            expert_mlps: Path of a layer's fused experts among NxDI's modules.
            projections: Names of an expert's projections.
            stacked: Names of the tensors with all experts of a layer; none where there are none.
            prefixes: What may stand before a path in a checkpoint, and nothing else.
            linears: Linear layers that have other names among NxDI's modules.
            renames: Paths in a checkpoint, each with the one that NxDI's modules have.
        """
        names, start = _any_of(projections), rf"(?:{_any_of(prefixes)})"
        self._expert = re.compile(
            rf"{start}{_with_layer(experts)}\.(?P<expert>{_NUMBER})"
            rf"\.(?P<projection>{names})\.(?P<suffix>\w+)\Z"
        )
        self._router = re.compile(rf"{start}{_with_layer(router)}\.\w+\Z")
        self._layer = re.compile(rf"{start}{_with_layer(_layer_path(experts))}\.(?P<rest>.+)\Z")
        self._mtp = re.compile(rf"{start}mtp\.")
        block = experts.rpartition(".")[0]
        self._block = (
            None
            if block == _layer_path(experts)
            else re.compile(rf"{start}{_with_layer(block)}\.(?P<rest>.+)\Z")
        )
        self._module = re.compile(rf"(?:^|\.){_with_layer(expert_mlps)}(?:\.|$)")
        self._stacked = (
            re.compile(rf"{start}{_with_layer(experts)}\.(?P<fused>{_any_of(stacked)})\Z")
            if stacked
            else None
        )
        self._renames = [
            (re.compile(rf"(?P<start>{start}){_with_layer(old)}(?P<rest>(?:\.\w+)*)\Z"), new)
            for old, new in renames
        ]
        self._linears = [
            (linear, re.compile(rf"{before}{_with_layer(path)}\Z"))
            for linear in linears
            for before, paths in ((start, (linear.checkpoint,)), (r"(?:.*\.)?", linear.all_modules))
            for path in paths
        ]

    def parse_expert_key(self, key: str) -> ExpertTensor | None:
        """Read the place of an expert's tensor from its name; None if it is another tensor's."""
        match = self._expert.match(key)
        if match is None:
            return None
        return ExpertTensor(
            int(match["layer"]), int(match["expert"]), match["projection"], match["suffix"]
        )

    def parse_stacked_key(self, key: str) -> tuple[int, str] | None:
        """Read the layer and the fused name of a tensor with all experts; None if it is none."""
        match = self._stacked.match(key) if self._stacked is not None else None
        return (int(match["layer"]), match["fused"]) if match else None

    def parse_linear_path(self, path: str) -> LinearPlace | None:
        """Read the place of a linear layer that is renamed; None if it is another module's path.

        Args:
            path: Its path in a checkpoint or among NxDI's modules.
        """
        matches = [(linear, pattern.match(path)) for linear, pattern in self._linears]
        found = {linear: match for linear, match in matches if match}
        if not found:
            return None
        layer = int(next(iter(found.values()))["layer"])
        return LinearPlace(layer, tuple(found))

    def rename(self, key: str) -> str:
        """The name that NxDI's modules have for a tensor, where it is declared; else its own."""
        for pattern, new in self._renames:
            match = pattern.match(key)
            if match is not None:
                layer = match.groupdict().get("layer")
                return f"{match['start']}{new.format(layer=layer)}{match['rest']}"
        return key

    def is_router_key(self, key: str) -> bool:
        """Whether a name is that of a router's tensor."""
        return self._router.match(key) is not None

    def parse_layer_key(self, key: str) -> tuple[int, str] | None:
        """Read the layer of a tensor and its name within the layer; None outside the layers."""
        match = self._layer.match(key)
        return (int(match["layer"]), match["rest"]) if match else None

    def is_mtp_key(self, key: str, num_layers: int) -> bool:
        """Whether a tensor is of what predicts further tokens (multi-token prediction, MTP).

        Hugging Face's checkpoints have it as layers beyond the last one (DeepSeek-V3, GLM-4.5) or
        beneath ``mtp`` (Qwen3-Next).

        Args:
            key: The tensor's name.
            num_layers: The model's number of layers.
        """
        place = self.parse_layer_key(key)
        return self._mtp.match(key) is not None if place is None else place[0] >= num_layers

    def parse_block_key(self, key: str) -> tuple[int, str] | None:
        """Read the layer of a tensor in an MoE block, and its name there; None for any other.

        The block is the module with the experts in it. A layer itself is none.
        """
        match = self._block.match(key) if self._block is not None else None
        return (int(match["layer"]), match["rest"]) if match else None

    def layer_of_module(self, module: str) -> int | None:
        """The layer that a module's dotted path lies in, if it is one of the fused experts."""
        match = self._module.search(module)
        return int(match["layer"]) if match else None


def _layer_path(path: str) -> str:
    """The path of a layer, from that of a part of it."""
    before, layer, _ = path.partition("{layer}")
    return before + layer


def _with_layer(path: str) -> str:
    return re.escape(path).replace(re.escape("{layer}"), rf"(?P<layer>{_NUMBER})")


def _any_of(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in names)
