"""The command line: arguments, messages, tables, plots, exit status."""

from nxdi_expertscale.cli.commands import main

__all__ = ["main"]
