"""The commands: their arguments, options and help, and what each calls; no logic.

What a command needs is imported when it runs, so that ``--help`` and a usage error cost nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nxdi_expertscale.cli.exit_status import ExitStatus
from nxdi_expertscale.cli.interrupt import ending_at_once
from nxdi_expertscale.cli.output import (
    PROGRAM,
    LogFile,
    print_message,
    print_report,
    to_json,
)
from nxdi_expertscale.errors import one_line
from nxdi_expertscale.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nxdi_expertscale.checkpoint.quantization_error import LayerError
    from nxdi_expertscale.display.results import Shown

MOST_WORKERS = 256
MOST_TOKENS = 1 << 20

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass
class Invocation:
    """What holds for a call of the program, whichever command it is.

    Attributes:
        debug: Whether the traceback of an error is wanted.
        can_go_on: Whether the same command, interrupted, goes on where it was.
        log: The file that messages go to as well.
    """

    debug: bool = False
    can_go_on: bool = False
    log: LogFile | None = None


class _Path(click.Path):
    """A file or folder. Whether it exists and may be read is found out when it is used."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, readable=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            str(value).encode()
        except UnicodeEncodeError:
            self.fail(f"{str(value)!r} is not a name in UTF-8; rename it", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path()


class _Place(_Path):
    """A folder, a model of the Hub, or a prefix in S3; it stays the text that was typed."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        super().convert(value, param, ctx)
        return str(value)


PLACE = _Place()


def _show_help(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        print_report(context.get_help())
        context.exit()


def _show_version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from nxdi_expertscale.diagnostics.packages import installed_versions

        versions = {name: version for name, version in installed_versions({}).items() if version}
        del versions[PROGRAM]
        lines = [f"{name} {version}" for name, version in versions.items()]
        print_report("\n".join([f"{PROGRAM}, version {__version__}", *lines, platform.platform()]))
        context.exit()


def _set_debug(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        context.ensure_object(Invocation).debug = True


def _flag(*names: str, callback: Callable[..., None], description: str) -> click.Option:
    return click.Option(
        names,
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=callback,
        help=description,
    )


def _open_log(context: click.Context, _option: click.Parameter, file: Path | None) -> None:
    if file is not None and not context.resilient_parsing:
        context.ensure_object(Invocation).log = LogFile(file)


def _common_options() -> list[click.Parameter]:
    return [
        _flag("--debug", callback=_set_debug, description="Print the traceback of an error."),
        click.Option(
            ["--log-file"],
            metavar="FILE",
            type=PATH,
            expose_value=False,
            callback=_open_log,
            help="Add what is printed on stderr, and what the package logs, to a file.",
        ),
        _flag("-h", "--help", callback=_show_help, description="Show this message and exit."),
    ]


class Command(click.Command):
    """A command with the options that all have. Help goes the way of every report."""

    def __init__(self, name: str | None, **attributes: Any) -> None:
        super().__init__(name, **{**attributes, "add_help_option": False})
        self.params += _common_options()


class CommandGroup(click.Group):
    """The program itself."""

    command_class = Command

    def __init__(self, name: str | None, **attributes: Any) -> None:
        super().__init__(name, **{**attributes, "add_help_option": False})
        version = _flag("--version", callback=_show_version, description="Show versions.")
        self.params += [version, *_common_options()]


@click.group(
    cls=CommandGroup,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGUMENTS]...",
    epilog=(
        "Exit status: 0 good; 1 the answer is no (verify found a fault, doctor a problem); 2 the "
        "request or the input is bad; 70 a defect of this program; 130 interrupted."
    ),
)
@click.pass_context
def cli(context: click.Context) -> None:
    """One FP8 scale per expert for mixture-of-experts models on AWS Trainium."""
    if context.invoked_subcommand is None:
        print_report(context.get_help())


def workers_option(function: _Function) -> _Function:
    """Add ``--workers``."""
    return click.option(
        "--workers",
        type=click.IntRange(min=1, max=MOST_WORKERS),
        metavar="N",
        help="Threads; by default one per core.",
    )(function)


def json_option(function: _Function) -> _Function:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(
        function
    )


def spool_option(function: _Function) -> _Function:
    """Add ``--spool``."""
    return click.option(
        "--spool",
        metavar="FOLDER",
        type=PATH,
        help="Where up to 2.15 GB of a checkpoint lie that is read from the Hub or from S3.",
    )(function)


def plot_option(function: _Function) -> _Function:
    """Add ``--plot``."""
    return click.option(
        "--plot",
        metavar="FILE",
        type=PATH,
        help="Draw the result as well, into a .png, .pdf or .svg file.",
    )(function)


def html_option(function: _Function) -> _Function:
    """Add ``--html``."""
    return click.option(
        "--html",
        metavar="FILE",
        type=PATH,
        help="Write the result as a page as well, which needs nothing beside it.",
    )(function)


def _check_files(plot: Path | None, html: Path | None) -> None:
    """Check that a picture and a page can be written, before there is anything to write."""
    from nxdi_expertscale.cli import pages, plots

    if plot is not None:
        plots.check_file(plot)
    if html is not None:
        pages.check_file(html)


def _write_files(
    result: Shown, title: str, draw: Callable[[], Figure], plot: Path | None, html: Path | None
) -> None:
    """Write a result's picture, and its page with the picture in it where there can be one."""
    from nxdi_expertscale.cli import pages, plots

    if plot is not None:
        plots.save(draw(), plot)
    if html is not None:
        picture = plots.as_png(draw()) if plots.can_be_drawn() else None
        pages.write_page(result, title, picture, html)


@contextmanager
def _reading(spool: Path | None, *places: str | None, into: str | None = None) -> Iterator[None]:
    """Say what of a disk is taken for checkpoints that are not on this host, and then read them.

    Args:
        spool: What the user named for it, if anything.
        places: What is read.
        into: What is made of it; None where nothing is.
    """
    from nxdi_expertscale.checkpoint.write.locate import is_in_s3, spool_for
    from nxdi_expertscale.sources.locate import is_remote
    from nxdi_expertscale.sources.spool import SPOOL_BYTES, is_in_memory, spool_folder

    remote = [place for place in places if place is not None and is_remote(place)]
    for place in remote:
        folder = spool_folder(spool) if into is None else spool_for(into, spool)
        memory = ", which is memory and no disk," if is_in_memory(folder) else ","
        print_message(
            f"{place}: is read through {folder}{memory} of which it takes up to "
            f"{SPOOL_BYTES / 1e9:.2f} GB at a time (--spool names another folder)"
        )
    if remote or (into is not None and is_in_s3(into)):
        with ending_at_once(can_go_on=into is not None):
            yield
    else:
        yield


@cli.command()
@click.argument("src", type=PLACE)
@click.argument("dst", type=PLACE)
@click.option(
    "--modules-to-not-convert",
    "exclusions",
    metavar="NAME",
    multiple=True,
    help="Keep this module in full precision; may be given several times. The router always is.",
)
@workers_option
@click.option("--overwrite", is_flag=True, help="Replace DST once the new one is complete.")
@click.option(
    "--keep-mtp",
    is_flag=True,
    help="Keep what predicts further tokens (MTP), in full precision. NxDI does not load it.",
)
@click.option(
    "--dry-run",
    "is_dry_run",
    is_flag=True,
    help="Only show what would be made, and what it takes; no weight is read.",
)
@spool_option
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Spread the work over the nodes of this Ray cluster: HOST:PORT of its head, or auto.",
)
@json_option
def quantize(
    *,
    src: str,
    dst: str,
    exclusions: tuple[str, ...],
    workers: int | None,
    overwrite: bool,
    keep_mtp: bool,
    is_dry_run: bool,
    spool: Path | None,
    ray: str | None,
    as_json: bool,
) -> ExitStatus:
    """Make the FP8 checkpoint DST from the checkpoint SRC.

    SRC is a folder with config.json and safetensors files, ORG/NAME or ORG/NAME@REVISION of the
    Hugging Face Hub where there is no such folder, or s3://BUCKET/PREFIX. A run that was cut off
    is continued by the same command. With --dry-run the status is 1 if the disk has too little
    room. With --ray, SRC and DST are what all nodes of the cluster reach by these names: a folder
    that they share, the Hub, S3; --workers and --spool are those of each node.
    """
    from nxdi_expertscale.checkpoint import quantize_checkpoint
    from nxdi_expertscale.cli import tables
    from nxdi_expertscale.cli.progress import progress_bar
    from nxdi_expertscale.display.results import listed

    if is_dry_run:
        if ray is not None:
            raise click.UsageError("--dry-run measures this host alone; leave --ray out")
        from nxdi_expertscale.checkpoint import run_dry

        found = run_dry(
            src,
            dst,
            modules_to_not_convert=exclusions,
            workers=workers,
            overwrite=overwrite,
            keep_mtp=keep_mtp,
            spool=spool,
        )
        print_report(to_json(found) if as_json else tables.dry_run_summary(found))
        return ExitStatus.GOOD if found.fits else ExitStatus.ANSWER_IS_NO
    click.get_current_context().ensure_object(Invocation).can_go_on = True
    with _reading(spool, src, into=dst), progress_bar("quantizing") as progress:
        result = quantize_checkpoint(
            src,
            dst,
            modules_to_not_convert=exclusions,
            workers=workers,
            overwrite=overwrite,
            keep_mtp=keep_mtp,
            spool=spool,
            ray=ray,
            progress=progress,
        )
    if result.code_left_out:
        print_message(f"{src}: code is not copied: {listed(result.code_left_out)}")
    try:
        print_report(to_json(result) if as_json else tables.quantization_summary(result))
    except OSError as error:
        # The work is done, and whoever waits for the status goes on with the checkpoint.
        print_message(f"{result.destination}: is complete, but {one_line(error)}")
    return ExitStatus.GOOD


@cli.command()
@click.option(
    "--model", metavar="FOLDER", type=PATH, help="Judge this checkpoint on this host as well."
)
@json_option
def doctor(*, model: Path | None, as_json: bool) -> ExitStatus:
    """Check whether this environment can do it.

    Shown is what is installed, what became of each patch, and what is wrong. NxDI is imported in
    a process of its own. The status is 0 for yes, 1 for no.
    """
    from nxdi_expertscale.diagnostics.doctor import examine

    if model is None:
        examination = examine()
    else:
        from nxdi_expertscale.diagnostics.model_check import examine_model

        examination = examine(model=examine_model(model))
    if as_json:
        print_report(to_json(examination))
    else:
        from nxdi_expertscale.cli import tables

        print_report(tables.examination(examination))
    return ExitStatus.GOOD if examination.works else ExitStatus.ANSWER_IS_NO


@cli.command()
@click.argument("dst", type=PLACE)
@click.option("--against", metavar="SRC", type=PLACE, help="The checkpoint that DST was made from.")
@workers_option
@spool_option
@json_option
def verify(
    *, dst: str, against: str | None, workers: int | None, spool: Path | None, as_json: bool
) -> ExitStatus:
    """Check that the finished checkpoint DST is good.

    Checked are files, names, shapes, the range of the weights, and the scales; with --against,
    the error of each layer is measured as well. The status is 1 if there is a fault.
    """
    from nxdi_expertscale.checkpoint import verify_checkpoint
    from nxdi_expertscale.cli import tables
    from nxdi_expertscale.cli.progress import progress_bar

    with _reading(spool, dst, against), progress_bar("verifying") as progress:
        result = verify_checkpoint(dst, against, workers=workers, spool=spool, progress=progress)
    print_report(to_json(result) if as_json else tables.verification_summary(result))
    return ExitStatus.ANSWER_IS_NO if result.faults else ExitStatus.GOOD


@cli.command()
@click.argument("checkpoint", type=PLACE)
@plot_option
@html_option
@workers_option
@spool_option
@json_option
def inspect(
    *,
    checkpoint: str,
    plot: Path | None,
    html: Path | None,
    workers: int | None,
    spool: Path | None,
    as_json: bool,
) -> None:
    """Show what CHECKPOINT is, quantized or not.

    Shown is also how far the scales of its experts lie apart, and the error that one scale for
    all of them would cause.
    """
    from nxdi_expertscale.checkpoint import inspect_checkpoint
    from nxdi_expertscale.cli import plots, tables
    from nxdi_expertscale.cli.progress import progress_bar

    _check_files(plot, html)
    with _reading(spool, checkpoint), progress_bar("reading") as progress:
        result = inspect_checkpoint(checkpoint, workers=workers, spool=spool, progress=progress)
    print_report(to_json(result) if as_json else tables.inspection_summary(result))
    title = f"{PurePath(result.folder).name}: how far the experts' scales lie apart"
    _write_files(result, title, lambda: plots.heat_map(result), plot, html)


@cli.command("neuron-config")
@click.argument("dst", type=PATH)
@click.option(
    "--tp-degree", metavar="N", type=click.IntRange(min=1), help="Tensor parallel degree."
)
@click.option("--batch-size", metavar="N", type=click.IntRange(min=1), help="Batch size.")
@click.option(
    "--seq-len", metavar="N", type=click.IntRange(min=1), help="Longest sequence, in tokens."
)
@click.option(
    "--moe-ep-degree",
    metavar="N",
    type=click.IntRange(min=1),
    help="Ranks over which experts are spread; a divisor of --tp-degree.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "vllm", "nxdi"]),
    default="json",
    show_default=True,
    help="JSON for both, vLLM's command, or Python for NxDI.",
)
@click.option(
    "--model",
    metavar="NAME",
    help="Where config and tokenizer are read from; by default DST, which has both.",
)
def neuron_config(
    *,
    dst: Path,
    tp_degree: int | None,
    batch_size: int | None,
    seq_len: int | None,
    moe_ep_degree: int | None,
    form: str,
    model: str | None,
) -> None:
    """Print the settings that load DST.

    DST is a finished checkpoint. They are JSON, or what is to be typed or pasted. What NxDI could
    not run is refused.
    """
    from nxdi_expertscale.checkpoint.neuron_config import read_neuron_settings
    from nxdi_expertscale.cli import launch
    from nxdi_expertscale.diagnostics.serving import check_serving

    opened, settings = read_neuron_settings(
        dst,
        tp_degree=tp_degree,
        batch_size=batch_size,
        seq_len=seq_len,
        moe_ep_degree=moe_ep_degree,
    )
    if form == "vllm":
        launch.check_vllm(settings, opened)
    check_serving(opened, launch.sizes(settings) if form == "vllm" else settings.neuron_config)
    name = model or settings.override_neuron_config["quantized_checkpoints_path"]
    if form == "json":
        print_report(to_json(settings))
    else:
        write = launch.vllm_command if form == "vllm" else launch.nxdi_program
        print_report(write(settings, name))


@cli.command()
@click.argument("dst", type=PATH)
@click.option(
    "--base-model",
    metavar="ORG/NAME[@REVISION]",
    required=True,
    help="The original's name on the Hugging Face hub.",
)
@click.option(
    "--against",
    metavar="SRC",
    type=PATH,
    help="The original: each layer's error is measured, and its own card kept below.",
)
@workers_option
def card(*, dst: Path, base_model: str, against: Path | None, workers: int | None) -> ExitStatus:
    """Print a model card for the finished checkpoint DST.

    It is what the Hugging Face hub shows of DST as its README.md, before 'hf upload'. The status is
    1, without a card, if DST is not good.
    """
    from nxdi_expertscale.checkpoint import verify_checkpoint
    from nxdi_expertscale.checkpoint.model_card import model_card
    from nxdi_expertscale.cli.progress import progress_bar

    name, _, revision = base_model.partition("@")
    errors: tuple[LayerError, ...] = ()
    if against is not None:
        with progress_bar("verifying") as progress:
            found = verify_checkpoint(dst, against, workers=workers, progress=progress)
        if found.faults:
            print_message(f"{found.faults[0].where}: {found.faults[0].what}")
            return ExitStatus.ANSWER_IS_NO
        errors = found.layers
    print_report(model_card(dst, name, revision=revision or None, source=against, errors=errors))
    return ExitStatus.GOOD


@cli.command()
@click.argument("src", type=PLACE)
@click.argument("dst", type=PLACE)
@click.option(
    "--text", metavar="FILE", type=PATH, help="A text in UTF-8; by default Python's documentation."
)
@click.option(
    "--tokens",
    metavar="N",
    type=click.IntRange(min=1, max=MOST_TOKENS),
    default=2048,
    show_default=True,
    help="How many tokens of the text to predict.",
)
@plot_option
@html_option
@spool_option
@json_option
def evaluate(
    *,
    src: str,
    dst: str,
    text: Path | None,
    tokens: int,
    plot: Path | None,
    html: Path | None,
    spool: Path | None,
    as_json: bool,
) -> None:
    """Measure the FP8 checkpoint DST against its original SRC.

    Shown beside it is the same checkpoint with the scales of a layer's experts averaged. It is
    computed on a CPU; the experts are read one by one, so a model need not fit in memory.
    """
    from nxdi_expertscale.cli import plots, tables
    from nxdi_expertscale.cli.progress import progress_bar
    from nxdi_expertscale.evaluation.evaluate import evaluate_checkpoint

    _check_files(plot, html)
    with _reading(spool, src, dst), progress_bar("evaluating", in_bytes=False) as progress:
        result = evaluate_checkpoint(
            src, dst, text=text, tokens=tokens, spool=spool, progress=progress
        )
    print_report(to_json(result) if as_json else tables.evaluation_table(result))
    title = f"{PurePath(result.destination).name} against {PurePath(result.source).name}"
    _write_files(result, title, lambda: plots.error_curves(result), plot, html)


@cli.command()
@json_option
def demo(*, as_json: bool) -> None:
    """Quantize and measure a small model, in two minutes.

    The model is trained, quantized, verified and measured on any machine. It is kept in the
    user's cache, so a second run takes seconds.
    """
    from nxdi_expertscale.cli import plots, tables
    from nxdi_expertscale.cli.progress import progress_bar
    from nxdi_expertscale.evaluation import demo

    result = demo.run(progress_bar)
    if as_json:
        print_report(to_json(result))
    elif not plots.can_be_drawn():
        print_report(tables.demo_summary(result, plots.INSTALL))
    else:
        file = result.folder / "evaluation.png"
        print_report(tables.demo_summary(result, str(file)))
        plots.save(plots.error_curves(result.spread), file)
