"""Equations without the network: GitHub draws a block of ```math itself; the site gets an SVG outline, drawn here by matplotlib."""

from __future__ import annotations

from html import escape
from typing import Any

from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from mkdocs.config.defaults import MkDocsConfig

SIZE = 100.0  # units of the outline an em
FONT = FontProperties(math_fontfamily="cm")
COMMANDS = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C", Outline.CLOSEPOLY: "Z"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Makes ```math a kind of block."""
    fences = {"name": "math", "class": "math", "format": block}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fences]
    return config


def block(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **others: Any) -> str:
    """The HTML of one block: a drawing a line, read aloud as its LaTeX, in the colour of the text around it."""
    del language, options, md, others
    return f'<div class="{css_class}">{"".join(drawing(line) for line in source.splitlines() if line.strip())}</div>'


def drawing(latex: str) -> str:
    """One line of LaTeX as an inline SVG."""
    outline = TextPath((0, 0), f"${latex.strip().rstrip(chr(92))}$", size=SIZE, prop=FONT)
    box = outline.get_extents()
    margin = SIZE / 20
    view = (box.x0 - margin, -box.y1 - margin, box.width + 2 * margin, box.height + 2 * margin)
    commands = []
    for points, code in outline.iter_segments(curves=True, simplify=False):
        commands.append(COMMANDS[code] + ("" if code == Outline.CLOSEPOLY else " ".join(f"{value:.1f}" for value in points)))
    shown = " ".join(f"{value:.1f}" for value in view)
    return (
        f'<svg role="img" aria-label="{escape(latex.strip(), quote=True)}" viewBox="{shown}" style="width:{view[2] / SIZE:.2f}em">'
        f'<path transform="scale(1,-1)" d="{"".join(commands)}"/></svg>'
    )
