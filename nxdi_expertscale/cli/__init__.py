"""The command line: commands, messages, tables, plots, exit status.

Importing it imports neither torch nor anything else that a command may not need.
"""

from nxdi_expertscale.cli.entry_point import main

__all__ = ["main"]
