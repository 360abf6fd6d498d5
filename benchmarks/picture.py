"""Draw, as text, what one shared scale does to the experts of a layer.

    python -m benchmarks.picture CHECKPOINT [LAYER [PROJECTION]]

The figures are the checkpoint's own: the scale of each expert over the mean of its layer, the
median of a projection's channels, as ``nxdi-expertscale inspect CHECKPOINT --json`` gives them.
The README's is of the demo's model, ``spread`` in its folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nxdi_expertscale import inspect_checkpoint

WIDTH = 32
"""Characters of the largest scale's bar."""


def render(experts: Sequence[float]) -> str:
    """Draw a layer.

    Args:
        experts: For each expert, its scale over the mean of all.
    """
    largest = max(experts)
    lines = [f"expert  {'its scale':<{WIDTH}}        with the mean as everyone's scale"]
    for number, ratio in enumerate(experts):
        bar = "#" * max(1, round(WIDTH * ratio / largest))
        # A weight is its code times the scale: the wrong scale makes it this much larger.
        factor = 1 / ratio
        wrong = f"{factor:.1f} times too large" if factor > 1 else f"{ratio:.1f} times too small"
        lines.append(f"{number:>6}  {bar:<{WIDTH}}  {ratio:4.2f}  its weights are {wrong}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Draw the layer and the projection that are named, by default ``up_proj`` of the first."""
    checkpoint, number, projection = [*arguments, *("0", "up_proj")[len(arguments) - 1 :]]
    print(render(inspect_checkpoint(checkpoint).layers[int(number)].projections[projection]))


if __name__ == "__main__":
    main(sys.argv[1:])
