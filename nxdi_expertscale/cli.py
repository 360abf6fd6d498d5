"""The command line, ``nxdi-expertscale``: arguments, messages and exit status, no logic.

Exit status: 0 good, 1 the answer is no, 2 the request or the input is bad.
"""

from __future__ import annotations

import sys

import click

from nxdi_expertscale.errors import ExpertScaleError
from nxdi_expertscale.version import __version__

ANSWER_IS_NO = 1
BAD_REQUEST = 2
INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nxdi-expertscale")
def cli() -> None:
    """One FP8 scale per expert for mixture-of-experts models on AWS Trainium."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status.

    A bad request or a bad input is one line on stderr and status 2, never a traceback.
    """
    try:
        status = cli.main(args=arguments, prog_name="nxdi-expertscale", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("nxdi-expertscale: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(BAD_REQUEST)
    except (ExpertScaleError, OSError) as error:
        click.echo(f"nxdi-expertscale: {' '.join(str(error).split())}", err=True)
        sys.exit(BAD_REQUEST)
    sys.exit(status if isinstance(status, int) else 0)
