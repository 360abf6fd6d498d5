"""Writes a result as one page of HTML: what it says, its tables and its picture, and no network."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from nxdi_expertscale.cli import plots
from nxdi_expertscale.display.results import html_facts, html_table, line
from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.version import __version__

if TYPE_CHECKING:
    from nxdi_expertscale.display.results import Shown

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 1.5rem 0 }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem }
th, td { padding: .2rem .9rem; border-bottom: 1px solid #ddd; vertical-align: top;
  overflow-wrap: anywhere }
img { max-width: 100% }
footer { color: #777; margin-top: 2rem }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""With it a browser loads nothing and runs nothing, whatever a name in the page says."""


def check_file(file: Path) -> None:
    """Check that a page can be written to a file, before its contents are computed.

    Args:
        file: The file to write.

    Raises:
        ConfigurationError: It cannot.
    """
    if file.suffix.lower() not in (".html", ".htm"):
        raise ConfigurationError(f"--html: {file} has to end in .html")
    if not file.absolute().parent.is_dir():
        raise ConfigurationError(f"--html: {file.parent} is not a folder; name one that is there")


def write_page(result: Shown, title: str, picture: bytes | None, file: Path) -> None:
    """Write a page.

    Args:
        result: What the page shows.
        title: Its title.
        picture: A PNG; None where there is none to draw, or matplotlib is not installed.
        file: The file to write, one that :func:`check_file` let pass.

    Raises:
        OSError: The file cannot be written.
    """
    name = escape(line(title))
    parts = [html_facts(result.facts()), *map(html_table, result.tables())]
    if picture is not None:
        data = base64.b64encode(picture).decode()
        parts.insert(1, f'<img alt="{name}" src="data:image/png;base64,{data}">')
    elif not plots.can_be_drawn():
        parts.append(f"<p>A picture {escape(plots.INSTALL)}</p>")
    file.write_text(
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{name}</h1>\n" + "\n".join(parts) + "\n"
        f"<footer>nxdi-expertscale {__version__}</footer></body></html>\n",
        encoding="utf-8",
    )
