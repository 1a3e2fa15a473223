"""Colours and lettering, light and dark: of charts as a Vega configuration, of the page as the same values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours, as #rrggbb.

    Args:
        background, text, muted, line, panel: of the page; text and muted are readable (contrast ≥ 4.5:1) on background and panel.
        accent: links, and what has the focus.
        series: of runs or shot groups, in order; after Okabe & Ito's palette, which the colour-blind can tell
            apart; the last five are for pages of more than seven runs, where a colour that comes twice would be worse.
        band: behind the shot groups, drawn nearly transparent.
        diverging: low, middle, high.
    """

    background: str
    text: str
    muted: str
    line: str
    panel: str
    accent: str
    series: tuple[str, ...]
    band: str
    diverging: tuple[str, str, str]


# Okabe & Ito's hues, each as dark or as light as 3:1 against its background asks for.
THEMES = {
    "light": Theme(
        **{"background": "#ffffff", "text": "#1b1f24", "muted": "#57606a", "line": "#d8dde3", "panel": "#f5f7f9", "accent": "#0b5fa5"},
        series=(
            "#0072b2",
            "#d55e00",
            "#00855f",
            "#b5508c",
            "#9a6b00",
            "#3a94cf",
            "#5c636b",
            "#7b3fb3",
            "#b00020",
            "#1b3a6b",
            "#5b7f00",
            "#7a3b12",
        ),
        band="#57606a",
        diverging=("#0072b2", "#f4f5f6", "#d55e00"),
    ),
    "dark": Theme(
        **{"background": "#14171a", "text": "#e6e8ea", "muted": "#a3abb3", "line": "#343a41", "panel": "#1d2125", "accent": "#6cb6ff"},
        series=(
            "#56b4e9",
            "#ff8f4f",
            "#35c79b",
            "#e0a0cc",
            "#f0c040",
            "#9db8ff",
            "#b0b6bd",
            "#b07cff",
            "#ff6b7a",
            "#4fd8d8",
            "#a8d14f",
            "#d19a6b",
        ),
        band="#c5ccd3",
        diverging=("#56b4e9", "#24292e", "#ff8f4f"),
    ),
}


def vega_config(theme: Theme, background: str = "transparent") -> dict[str, Any]:
    """What Vega-Lite takes as "config": charts name no colour of their own, so that they follow it."""
    lettering = {"labelColor": theme.muted, "titleColor": theme.text, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 500}
    return {
        "background": background,
        "font": FONT,
        "view": {"stroke": None},
        "axis": {**lettering, "gridColor": theme.line, "domainColor": theme.muted, "tickColor": theme.muted, "gridOpacity": 0.7},
        "legend": {**lettering, "orient": "top", "labelLimit": 320, "symbolStrokeWidth": 2, "symbolOpacity": 1},
        "title": {"color": theme.text, "anchor": "start", "fontSize": 13, "fontWeight": 600, "offset": 8},
        "mark": {"color": theme.series[0]},
        "text": {"color": theme.muted, "fontSize": 12},
        "rule": {"color": theme.muted},
        "range": {"category": list(theme.series), "diverging": list(theme.diverging)},
        "style": {
            "band": {"color": theme.band},
            "guide": {"color": theme.muted, "strokeDash": [5, 4], "strokeWidth": 1.5},
            "ideal": {"color": theme.text, "strokeDash": [6, 3], "strokeWidth": 2},
            "note": {"color": theme.muted, "fontSize": 12},
        },
    }
