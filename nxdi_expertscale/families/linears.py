"""Linear layers that have other names in checkpoints than among NxDI's modules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RenamedLinear:
    """A linear layer of every decoder layer, by its names.

    Paths have ``{layer}`` where the layer's number stands, and no ``model.`` before them.

    Attributes:
        checkpoint: Its path in a checkpoint, ``layers.{layer}.self_attn.q_proj``.
        modules: Its paths among NxDI's modules, of which a model has one or two; the usual one
            first.
        fused: Paths at which NxDI holds it fused with others, where it is told to.
    """

    checkpoint: str
    modules: tuple[str, ...]
    fused: tuple[str, ...] = ()

    def checkpoint_path(self, layer: int) -> str:
        """Its path in a checkpoint."""
        return self.checkpoint.format(layer=layer)

    def module_paths(self, layer: int) -> tuple[str, ...]:
        """Its paths among NxDI's modules, fused or not."""
        return tuple(path.format(layer=layer) for path in self.all_modules)

    @property
    def all_modules(self) -> tuple[str, ...]:
        """Its paths among NxDI's modules, fused or not, with ``{layer}``."""
        return (*self.modules, *self.fused)


def attention_linears(checkpoint: str, module: str) -> tuple[RenamedLinear, ...]:
    """The projections of NxDI's attention (``modules/attention/gqa.py``, ``attention_base.py``).

    Queries, keys and values have a module each, or with ``fused_qkv`` one together, ``Wqkv``. With
    parallel attention there is a second set of both, for contexts and for token generation.

    Args:
        checkpoint: Path of a layer's attention in a checkpoint, ``layers.{layer}.self_attn``.
        module: Path of a layer's attention among NxDI's modules.
    """
    stages = ("", "cte_", "tkg_")
    # Without a module of its own in the state dict that NxDI's converters make.
    fused = (*(f"{module}.{stage}qkv_proj.Wqkv" for stage in stages), f"{module}.Wqkv")
    return (
        *(
            RenamedLinear(
                checkpoint=f"{checkpoint}.{name}",
                modules=tuple(f"{module}.{stage}qkv_proj.{name}" for stage in stages),
                fused=fused,
            )
            for name in ("q_proj", "k_proj", "v_proj")
        ),
        RenamedLinear(
            checkpoint=f"{checkpoint}.o_proj",
            modules=tuple(f"{module}.{stage}o_proj.o_proj" for stage in stages),
        ),
    )
