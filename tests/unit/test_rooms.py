"""The README draws the rooms as they are."""

from __future__ import annotations

from pathlib import Path

from tests.unit import rooms


def test_the_readmes_drawing_is_what_the_code_has() -> None:
    assert rooms.drawn() == rooms.drawing(), "run python -m tests.unit.rooms"


def test_every_room_is_drawn_and_imports_downwards_only() -> None:
    imports = rooms.imports_of_rooms()
    drawn = [room for row in rooms.ROWS for room in row]

    assert set(imports) == {*drawn, *rooms.LEAVES, *rooms.OUTSIDE}
    for height, row in enumerate(rooms.ROWS):
        below = {room for lower in rooms.ROWS[height + 1 :] for room in lower}
        for room in row:
            assert imports[room] - set(rooms.LEAVES) <= below, room


def test_lazy_and_type_checking_imports_count(tmp_path: Path) -> None:
    (tmp_path / "high").mkdir()
    (tmp_path / "high" / "one.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from nxdi_expertscale.low.thing import Thing\n"
        "def run():\n    from nxdi_expertscale import lower\n    import nxdi_expertscale.lowest.x\n"
    )

    assert rooms.imports_of_rooms(tmp_path) == {"high": {"low", "lower", "lowest"}}
