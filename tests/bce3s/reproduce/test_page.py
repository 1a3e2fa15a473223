"""The page: figures with their spread, what is missing as a dash, empty groups as n/a, shared runs named once."""

from __future__ import annotations

from typing import Any

from bce3s.reproduce.figures import measure_title
from bce3s.reproduce.page import page
from bce3s.seeds import combine

LAST, FLIP, TWO = "last_epoch_no_tta", "last_epoch_flip_tta", "stage2:last_epoch_no_tta"


def groups(overall: float) -> dict[str, float | None]:
    return {"all": overall, "many": overall + 1, "medium": overall - 1, "few": None}


def row(name: str, **changes: Any) -> dict[str, Any]:
    by_seed = {seed: {LAST: groups(50.0 + seed), FLIP: groups(51.0 + seed), TWO: groups(60.0)} for seed in (0, 1, 2)}
    measured = {"seeds": [0, 1, 2], "missing_seeds": [], "n": 3, "figures": combine(by_seed)["figures"], "by_seed": by_seed}
    cost = {"train_s": 90.0, "wall_s": None, "images_per_s": 1234.5}
    named = {"name": name, "title": name.upper(), "runs": name, "trained": True, "headline": LAST, "command": f"bce3s {name}"}
    return {**named, **measured, "cost": cost, "published": None, **changes}


def made(rows: list[dict[str, Any]]) -> list[str]:
    record = {
        **{"title": "a table", "command": "bce3s reproduce it", "notes": ["a note"], "rows": rows, "claims": [], "environments": []},
        **{"version": "0", "budget": "small", "device_asked": "auto"},
    }
    return page(record).splitlines()


def test_figures_beside_published_ones() -> None:
    published = {"label": "theirs", "all": 59.5, "many": None, "medium": 58.0, "few": 1.0}
    lines = made([row("ours", published=published), row("other", published={**published, "all": 7.0})])
    assert "| OURS | 51.00 ± 1.00 | 52.00 ± 1.00 | 50.00 ± 1.00 | n/a | 3 | 59.50 | – | 58.00 | 1.00 | [1] |" in lines
    assert any("| 7.00 | – | 58.00 | 1.00 | [1] |" in line for line in lines)
    assert "1. theirs" in lines
    assert "| OURS | last epoch, flip TTA | 52.00 ± 1.00 | 53.00 ± 1.00 | 51.00 ± 1.00 | n/a | 3 |" in lines
    assert "| OURS | 1.5 | – | 1,234 | 3 |" in lines


def test_what_is_missing_and_what_is_only_published() -> None:
    empty = {"n": 0, "seeds": [], "missing_seeds": [0, 1], "figures": {}, "cost": dict.fromkeys(("train_s", "wall_s", "images_per_s"))}
    only = {"name": "x", "title": "X", "trained": False, "headline": LAST, "published": {"label": "theirs", **groups(40.0)}}
    lines = made([row("ours", **empty), only])
    assert "| OURS | – | – | – | – | 0 of 2 | – | – | – | – | – |" in lines
    assert "| X | – | – | – | – | – | 40.00 | 41.00 | 39.00 | – | [1] |" in lines
    assert "## Beside the headline" not in lines
    assert "- no finished run yet" in lines


def test_rows_that_share_runs_share_their_lines() -> None:
    lines = made([row("ours"), row("two", runs="ours", headline=TWO)])
    assert any(line.startswith("| TWO (stage two, last epoch, no TTA) | 60.00 ± 0.00 |") for line in lines)
    assert sum("last epoch, flip TTA" in line for line in lines) == 1
    assert [line for line in lines if line.startswith("bce3s ")] == ["bce3s ours"]


def test_measures_in_words() -> None:
    assert measure_title(LAST) == "last epoch, no TTA"
    assert measure_title("last_epoch_average_no_tta") == "last epoch, average of weights, no TTA"
    assert measure_title("stage2:last_epoch_flip_tta") == "stage two, last epoch, flip TTA"
    assert measure_title("best_on_test_no_tta") == "best on test, no TTA"
