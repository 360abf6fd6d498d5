"""Draws results as pictures, with matplotlib, the optional extra ``plot``."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from nxdi_expertscale.errors import ConfigurationError, printable, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nxdi_expertscale.checkpoint import Inspection
    from nxdi_expertscale.checkpoint.expert_spread import LayerSpread
    from nxdi_expertscale.evaluation.evaluate import Evaluation

_FORMATS = (".png", ".pdf", ".svg")
_ORIGINAL, _EXPERT_WISE, _AVERAGED = "tab:gray", "tab:blue", "tab:red"
_WELL_APART = 1.5
"""A factor from the mean at which it is no accident on which side of it a projection lies."""

_DPI = 150

_TALLEST = 40.0
"""Inches of the tallest picture: a row for each layer of 170, and narrower rows beyond."""

INSTALL = "needs matplotlib; install it with: pip install 'nxdi-expertscale[plot]'"


def can_be_drawn() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_file(file: Path) -> None:
    """Check that a picture can be drawn into a file, before its contents are computed.

    Args:
        file: The file to write.

    Raises:
        ConfigurationError: matplotlib is not installed, or cannot write such a file.
    """
    if not can_be_drawn():
        raise ConfigurationError(f"--plot: {INSTALL}")
    if file.suffix.lower() not in _FORMATS:
        raise ConfigurationError(f"--plot: {file} has to end in .png, .pdf or .svg")
    if not file.absolute().parent.is_dir():
        raise ConfigurationError(f"--plot: {file.parent} is not a folder; name one that is there")


def save(figure: Figure, file: Path) -> None:
    """Write a picture into a file, one that :func:`check_file` let pass.

    Raises:
        OSError: The file cannot be written.
    """
    figure.savefig(file, dpi=_DPI)


def as_png(figure: Figure) -> bytes:
    """A picture as the bytes of a PNG."""
    content = io.BytesIO()
    figure.savefig(content, dpi=_DPI, format="png")
    return content.getvalue()


def heat_map(result: Inspection) -> Figure:
    """Draw the scale of each expert over the mean of its layer, as a heat map.

    One row for each layer, one column for each expert; beside it the error that one shared scale
    would cause in each layer. Projections that lie in opposite directions, which the median of all
    channels would not show, are drawn apart.

    Args:
        result: The spread of the experts' scales.

    Raises:
        ConfigurationError: There are no experts.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

    if not result.layers:
        raise ConfigurationError(f"--plot: {result.folder} has no experts to draw")
    names = [str(layer.layer) for layer in result.layers]
    ratios = panels(result.layers)
    # Symmetric about 1, and never so narrow that differences of a percent look like much.
    drawn = [ratio for rows in ratios.values() for row in rows for ratio in row]
    extreme = max(1.25, *(max(ratio, 1 / ratio) for ratio in drawn))
    height = min(max(3.2, 0.22 * len(names) + 2), _TALLEST)
    figure = _figure(4 + 7 * len(ratios) ** 0.5, height)
    widths = (*(4 for _ in ratios), len(ratios) ** 0.5)
    *heats, bars = figure.subplots(1, len(ratios) + 1, sharey=True, width_ratios=widths)
    for heat, (title, rows) in zip(heats, ratios.items(), strict=True):
        image = heat.imshow(
            rows,
            aspect="auto",
            cmap="RdBu_r",
            norm=LogNorm(1 / extreme, extreme),
            interpolation="nearest",
        )
        heat.set(xlabel="expert", title=title)
        heat.xaxis.set_major_locator(MaxNLocator(16 // len(ratios), integer=True))
    heats[0].set_ylabel("layer")
    step = -(-len(names) // 48)
    heats[0].set_yticks(range(0, len(names), step), names[::step])
    bar = figure.colorbar(image, ax=heats, pad=0.02)
    # A logarithmic bar puts ticks of its own back when these are given to its constructor.
    bar.set_ticks(round_ticks(extreme))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(_ratio))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bars.barh(range(len(names)), [layer.shared_scale_error for layer in result.layers], color="0.4")
    bars.set(xlabel="error of the weights", title="with one shared scale", xlim=(0, None))
    bars.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _set_title(figure, f"{PurePath(result.folder).name}: how far the experts' scales lie apart")
    return figure


def panels(layers: Sequence[LayerSpread]) -> dict[str, list[tuple[float, ...]]]:
    """What each panel shows, by its title: of each layer, each expert's scale over the mean."""
    whole = {"scale of each expert over its layer's mean": [layer.experts for layer in layers]}
    if not any(map(_cancels, layers)):
        return whole
    return {
        f"{name}: scale over the mean": [layer.projections[name] for layer in layers]
        for name in layers[0].projections
    }


def _cancels(layer: LayerSpread) -> bool:
    """Whether an expert's scale is well above the mean in one projection, below it in another."""
    of_each_expert = zip(*layer.projections.values(), strict=True)
    return any(
        max(ratios) > _WELL_APART and min(ratios) < 1 / _WELL_APART for ratios in of_each_expert
    )


def round_ticks(extreme: float) -> list[float]:
    """Round factors on both sides of 1, within what a bar shows; at most nine in all."""
    octaves = int(math.log2(extreme))
    stride = -(-octaves // 4)
    powers = [2.0**octave for octave in range(stride, octaves + 1, stride)] if octaves else []
    ticks = powers or [step for step in (1.1, 1.25, 1.5) if step <= extreme]
    return [*(1 / step for step in reversed(ticks)), 1.0, *ticks]


def _ratio(value: float, _position: int | None = None) -> str:
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"


def error_curves(result: Evaluation) -> Figure:
    """Draw the error of each layer's experts, and the perplexities."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = _figure(10, 4)
    layers, perplexities = figure.subplots(1, 2, width_ratios=(3, 2))
    kinds = result.kinds()
    for (name, measured), colour in zip(kinds.items(), (_EXPERT_WISE, _AVERAGED), strict=True):
        numbers, errors = zip(*measured.layer_errors.items(), strict=True)
        layers.plot(numbers, errors, marker="o", color=colour, label=f"scales: {name}")
    layers.set(xlabel="layer", ylim=(0, None), title="error of the experts, given the same input")
    layers.xaxis.set_major_locator(MaxNLocator(integer=True))
    layers.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    layers.grid(axis="y", alpha=0.3)
    layers.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    values = [result.perplexity, *(measured.perplexity for measured in kinds.values())]
    names = ["original", *(name.replace(", ", ",\n") for name in kinds)]
    bars = perplexities.bar(names, values, color=(_ORIGINAL, _EXPERT_WISE, _AVERAGED))
    perplexities.bar_label(bars, fmt="{:.4g}")
    perplexities.set(title="perplexity (lower is better)")
    perplexities.margins(y=0.1)
    _set_title(figure, f"{PurePath(result.destination).name}, {result.tokens} tokens of text")
    return figure


def _set_title(figure: Any, title: str) -> None:
    # A folder may have any name, and between two dollar signs matplotlib would read formulas.
    figure.suptitle(shorten(printable(title), 120), parse_math=False)


def _figure(width: float, height: float) -> Figure:
    """Make an empty picture, sizes in inches, without touching anything global of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
