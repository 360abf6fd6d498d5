"""The rooms of the package and what each imports, drawn for the README from the code itself.

    python -m tests.unit.rooms

writes the drawing between its marks. Imports in functions and for type checking count.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PACKAGE = "nxdi_expertscale"
BEGIN, END = "<!-- rooms: begin -->", "<!-- rooms: end -->"

ROWS = (
    ("testing",),
    ("cli", "vllm"),
    ("evaluation", "diagnostics"),
    ("patches", "activation"),
    ("loading",),
    ("settings", "checkpoint"),
    ("plugins", "sources"),
    ("families", "display"),
    ("numerics", "hooking"),
)
"""The rooms from the top to the bottom; one imports those in rows below its own."""

LEAVES = ("errors", "version", "working_directory")
"""What any room may import, and which is left out of the drawing."""

OUTSIDE = ("__init__", "__main__", "startup")
"""The package's entrances, which import what they hand on."""


def imports_of_rooms(package: Path = ROOT / PACKAGE) -> dict[str, set[str]]:
    """For each room, the other rooms that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        found[room] |= {
            other
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for other in _rooms_in(node)
        } - {room}
    return dict(found)


def _rooms_in(node: ast.AST) -> set[str]:
    """The rooms that an import statement names."""
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        names = [node.module]
        if node.module == PACKAGE:
            names = [f"{PACKAGE}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        return set()
    return {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")}


def drawing() -> str:
    """The rooms from the top to the bottom, each with the rooms that it imports."""
    imports = imports_of_rooms()
    order = [room for row in ROWS for room in row]
    lines = ["```"]
    for row in ROWS:
        for room in row:
            below = [other for other in order if other in imports[room]]
            lines.append(f"{room:12} → {', '.join(below)}" if below else room)
    return "\n".join([*lines, "```"])


def drawn() -> str:
    """The drawing that the README has."""
    return README.read_text(encoding="utf-8").partition(f"{BEGIN}\n")[2].partition(f"\n{END}")[0]


def main() -> None:
    """Write the drawing into the README."""
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{README}: has not both of {BEGIN} and {END}")
    README.write_text(f"{before}{BEGIN}\n{drawing()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
