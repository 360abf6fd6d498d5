"""The command line, ``nxdi-expertscale``: arguments, messages and exit status, no logic.

Exit status: 0 good, 1 the answer is no, 2 the request or the input is bad.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from nxdi_expertscale.errors import ExpertScaleError
from nxdi_expertscale.version import __version__

ANSWER_IS_NO = 1
BAD_REQUEST = 2
INTERRUPTED = 130

PATH = click.Path(path_type=Path, readable=False)
"""A file or folder; what may not be read is said in one line when it is."""

_LONGEST_MESSAGE = 2000


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nxdi-expertscale")
def cli() -> None:
    """One FP8 scale per expert for mixture-of-experts models on AWS Trainium."""


@cli.command()
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option(
    "--modules-to-not-convert",
    "exclusions",
    metavar="NAME",
    multiple=True,
    help="A module to leave as it is; may be given several times. The router always is.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads; by default one per core.")
@click.option("--overwrite", is_flag=True, help="Replace DST once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def quantize(
    *,
    src: Path,
    dst: Path,
    exclusions: tuple[str, ...],
    workers: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make the FP8 checkpoint DST from the checkpoint SRC, a folder of safetensors files.

    A run that was cut off goes on when it is run again.
    """
    from nxdi_expertscale.checkpoint import quantize_checkpoint
    from nxdi_expertscale.cli import tables

    with tables.progress_bar("quantizing") as progress:
        result = quantize_checkpoint(
            src,
            dst,
            modules_to_not_convert=exclusions,
            workers=workers,
            overwrite=overwrite,
            progress=progress,
        )
    for name in result.unused_exclusions:
        _say(f"nxdi-expertscale: no module of {src} is named {name!r}", err=True)
    _say(tables.to_json(result) if as_json else tables.quantization_summary(result))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def doctor(*, as_json: bool) -> int:
    """Say whether it will work here, and if not why.

    NxDI is imported in a process of its own. The status is 0 for yes, 1 for no.
    """
    from nxdi_expertscale.cli import tables
    from nxdi_expertscale.diagnostics.doctor import examine

    found = examine()
    _say(tables.to_json(found) if as_json else tables.examination(found))
    return 0 if found.works else ANSWER_IS_NO


@cli.command()
@click.argument("dst", type=PATH)
@click.option("--against", metavar="SRC", type=PATH, help="Its source.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads; by default one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print what is found as JSON.")
def verify(*, dst: Path, against: Path | None, workers: int | None, as_json: bool) -> int:
    """Check the finished checkpoint DST: files, names, shapes, range and scales.

    With SRC, measure the error of each layer as well. The status is 1 if there is a fault.
    """
    from nxdi_expertscale.checkpoint import verify_checkpoint
    from nxdi_expertscale.cli import tables

    with tables.progress_bar("verifying") as progress:
        result = verify_checkpoint(dst, against, workers=workers, progress=progress)
    _say(tables.to_json(result) if as_json else tables.verification_summary(result))
    return ANSWER_IS_NO if result.faults else 0


@cli.command()
@click.argument("checkpoint", type=PATH)
@click.option("--plot", metavar="FILE.png", type=PATH, help="Draw it too.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads; by default one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print what is found as JSON.")
def inspect(*, checkpoint: Path, plot: Path | None, workers: int | None, as_json: bool) -> None:
    """Say what CHECKPOINT is, quantized or not, and how far its experts' scales lie apart."""
    from nxdi_expertscale.checkpoint import inspect_checkpoint
    from nxdi_expertscale.cli import plots, tables

    if plot is not None:
        plots.check_file(plot)
    with tables.progress_bar("reading") as progress:
        result = inspect_checkpoint(checkpoint, workers=workers, progress=progress)
    if plot is not None:
        plots.draw_heat_map(result, plot)
    _say(tables.to_json(result) if as_json else tables.inspection_summary(result))


@cli.command("neuron-config")
@click.argument("dst", type=PATH)
@click.option("--tp-degree", type=click.IntRange(min=1), help="Tensor parallel degree.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Batch size.")
@click.option("--seq-len", type=click.IntRange(min=1), help="Longest sequence, in tokens.")
def neuron_config(
    *, dst: Path, tp_degree: int | None, batch_size: int | None, seq_len: int | None
) -> None:
    """Print the settings that load the finished checkpoint DST, for NxDI and for vLLM, as JSON."""
    from nxdi_expertscale.checkpoint import neuron_settings
    from nxdi_expertscale.cli import tables

    settings = neuron_settings(dst, tp_degree=tp_degree, batch_size=batch_size, seq_len=seq_len)
    _say(tables.to_json(settings))


@cli.command()
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option("--text", type=PATH, help="By default Python's own documentation.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="How many tokens of the text to predict.",
)
@click.option("--plot", metavar="FILE.png", type=PATH, help="Draw it too.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def evaluate(
    *, src: Path, dst: Path, text: Path | None, tokens: int, plot: Path | None, as_json: bool
) -> None:
    """Measure the quantized checkpoint DST against its original SRC, on a CPU.

    Beside DST as it is stands what averaged scales would make of it. The experts are read one by
    one: a model need not fit in memory.
    """
    from nxdi_expertscale.cli import plots, tables
    from nxdi_expertscale.evaluation.evaluate import evaluate_checkpoint

    if plot is not None:
        plots.check_file(plot)
    with tables.progress_bar("evaluating", tables.STEPS) as progress:
        result = evaluate_checkpoint(src, dst, text=text, tokens=tokens, progress=progress)
    if plot is not None:
        plots.draw_evaluation(result, plot)
    _say(tables.to_json(result) if as_json else tables.evaluation_table(result))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def demo(*, as_json: bool) -> None:
    """Train a small model, quantize it, verify it, and measure it: two minutes, on any machine.

    The model is kept in the user's cache, so a second run takes seconds.
    """
    from functools import partial

    from nxdi_expertscale.cli import plots, tables
    from nxdi_expertscale.evaluation import demo

    result = demo.run(partial(tables.progress_bar, measure=tables.STEPS))
    if as_json:
        _say(tables.to_json(result))
        return
    picture = plots.INSTALL
    if plots.can_be_drawn():
        file = result.folder / "evaluation.png"
        plots.draw_evaluation(result.spread, file)
        picture = str(file)
    _say(tables.demo_summary(result, picture))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status.

    A bad request or a bad input is one line on stderr and status 2, never a traceback. Ctrl-C
    and SIGTERM are one line and status 130.
    """
    # A service that is stopped ends as one at a keyboard that is interrupted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = cli.main(args=arguments, prog_name="nxdi-expertscale", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _say("nxdi-expertscale: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(BAD_REQUEST)
    except (ExpertScaleError, OSError) as error:
        _say(f"nxdi-expertscale: {_one_line(str(error))}", err=True)
        sys.exit(BAD_REQUEST)
    sys.exit(status if isinstance(status, int) else 0)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    if len(line) <= _LONGEST_MESSAGE:
        return line
    # The names are anyone's and may be megabytes; the end says what to do.
    half = _LONGEST_MESSAGE // 2
    return f"{line[:half]} … {line[-half:]}"


def _say(text: str, *, err: bool = False) -> None:
    """Print text with names that are anyone's: what could steer a terminal is spelled out."""
    plain = "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
    click.echo(plain, err=err)
