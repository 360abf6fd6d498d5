"""``python -m nxdi_expertscale.testing``: the check of a family, for its author."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from nxdi_expertscale.cli.commands import PATH, Command, json_option
from nxdi_expertscale.cli.entry_point import main
from nxdi_expertscale.cli.exit_status import ExitStatus
from nxdi_expertscale.cli.output import print_report, to_json


@click.command(cls=Command)
@click.argument("checkpoint", type=PATH)
@click.option(
    "--application",
    metavar="MODULE:CLASS",
    required=True,
    help="The model's application in NxDI, of a module that can be imported.",
)
@click.option(
    "--config",
    "config_cls",
    metavar="MODULE:CLASS",
    help="The class of its config, where the application does not say.",
)
@click.option(
    "--reference",
    metavar="FOLDER",
    type=PATH,
    help="The model in full precision; by default CHECKPOINT, dequantized if it is FP8.",
)
@click.option("--keep", metavar="FOLDER", type=PATH, help="Keep the quantized checkpoint there.")
@json_option
def check(
    *,
    checkpoint: Path,
    application: str,
    config_cls: str | None,
    reference: Path | None,
    keep: Path | None,
    as_json: bool,
) -> ExitStatus:
    """Hold a family's declaration to a small model of it, CHECKPOINT, run by NxDI on a CPU.

    The model is quantized, verified, and loaded with one scale per expert and unquantized: every
    parameter, every block and the logits are compared.
    """
    from nxdi_expertscale.testing.check import check_family
    from nxdi_expertscale.testing.report import summary

    # NxDI and NxD print what they do, and log to stdout.
    with redirect_stdout(sys.stderr):
        found = check_family(
            checkpoint, application, config_cls=config_cls, reference=reference, folder=keep
        )
    print_report(to_json(found) if as_json else summary(found))
    return ExitStatus.GOOD if found.is_right else ExitStatus.ANSWER_IS_NO


if __name__ == "__main__":
    main(command=check)
