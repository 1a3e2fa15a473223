"""Draws floors.svg, the map of docs/architecture.md, from the plan in tests/test_layers.py: `python docs/figures/draw_floors.py`."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDTH, MARGIN, ROW, CHAR = 960, 16, 30, 7.6
COLOURS = {"pipelines": "#dbe9f6", "bce3s": "#fde3cf", "": "#ececec"}


def draw() -> str:
    """The SVG: the attic at the top, one box a room."""
    sys.path.insert(0, str(ROOT))
    from tests.test_layers import FLOORS

    y, parts = MARGIN, []
    for floor in reversed(FLOORS):
        rows = _rows(floor.rooms)
        height = ROW * len(rows) + 12
        parts.append(f'<rect x="{MARGIN}" y="{y}" width="{WIDTH - 2 * MARGIN}" height="{height}" rx="6" fill="#fff" stroke="#9aa5ad"/>')
        for number, row in enumerate(rows):
            x = MARGIN + 8.0
            for room in row:
                parts.append(_box(room, x, y + 8 + number * ROW))
                x += _width(room) + 8
        y += height + 8
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + MARGIN - 8}" font-family="monospace" font-size="12.5">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{y + MARGIN - 8}" fill="#fff"/>', *parts, "</svg>", ""])


def _rows(rooms: tuple[str, ...]) -> list[list[str]]:
    rows: list[list[str]] = [[]]
    used = 0.0
    for room in rooms:
        if used + _width(room) > WIDTH - 2 * MARGIN - 16:
            rows.append([])
            used = 0.0
        rows[-1].append(room)
        used += _width(room) + 8
    return rows


def _width(room: str) -> float:
    return len(room) * CHAR + 14


def _box(room: str, x: float, y: float) -> str:
    colour = COLOURS.get(room.partition(".")[0], COLOURS[""])
    box = f'<rect x="{x:.1f}" y="{y}" width="{_width(room):.1f}" height="24" rx="4" fill="{colour}"/>'
    return f'{box}<text x="{x + 7:.1f}" y="{y + 16.5}" fill="#222">{escape(room)}</text>'


if __name__ == "__main__":
    Path(__file__).with_name("floors.svg").write_text(draw(), encoding="utf-8")
