"""Two profiles side by side: which rows became slower by more than their noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from bce3s.throughput.rows import NAMES, PROFILE_FORMAT, PROFILE_VERSION, Row, row_from_dict
from pipelines.types import UserError

_MUST_AGREE = (
    ("data set", ("data", "fingerprint")),
    ("processor", ("hardware", "cpu")),
    ("number of cores", ("hardware", "usable_cores")),
    ("GPU", ("hardware", "gpu")),
    ("driver", ("hardware", "driver")),
    ("loader", ("loader",)),
    ("precision", ("precision",)),
    ("batch size", ("config", "data", "batch_size")),
    ("image size", ("config", "data", "image_size")),
    ("network", ("config", "model", "arch")),
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One row of both profiles: `ratio` is the later median over the earlier, `outcome` "slower", "faster" or "same"."""

    key: str
    before: Row
    after: Row
    ratio: float
    outcome: str


def compare_rows(before: Sequence[Row], after: Sequence[Row], threshold: float) -> list[Change]:
    """The rows measured in both. One has changed if its medians differ by more than `threshold` and its ranges do not meet."""
    later = {row.key: row for row in after if row.rates}
    changes = []
    for row in before:
        other = later.get(row.key)
        if not row.rates or other is None:
            continue
        ratio = other.median / row.median
        slower = ratio < 1.0 - threshold and max(other.rates) < min(row.rates)
        faster = ratio > 1.0 + threshold and min(other.rates) > max(row.rates)
        outcome = "slower" if slower else "faster" if faster else "same"
        changes.append(Change(key=row.key, before=row, after=other, ratio=ratio, outcome=outcome))
    return changes


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Sentences on what makes two records hard to compare."""
    found = []
    for name, path in _MUST_AGREE:
        one, other = _at(before, path), _at(after, path)
        if one != other:
            found.append(f"the two profiles differ in their {name}: {_short(one)}, then {_short(other)}")
    return found


def lost_rows(before: Sequence[Row], after: Sequence[Row]) -> list[Row]:
    """The rows that were measured before and not after."""
    later = {row.key for row in after if row.rates}
    return [row for row in before if row.rates and row.key not in later]


def needed_rows(record: dict[str, Any]) -> set[str]:
    """Keys of the rows whose loss is a regression: end to end, and what every batch of that run passes through."""
    path = _at(record, ("verdict", "path"))
    return {"together.real", *(path if isinstance(path, list) else [])}


def _at(record: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = record
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def read_profile(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """A record that `bce3s profile --json-out` wrote, and its rows; rows that this program does not know are left out.

    Raises:
        UserError: missing, damaged, or not a profile; names the path.
    """
    advice = "make one with 'bce3s profile --json-out FILE'"
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; {advice}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {advice}") from error
    if not isinstance(record, dict) or record.get("format") != PROFILE_FORMAT:
        raise UserError(f"{path} is not a profile; {advice}")
    if record.get("version") != PROFILE_VERSION:
        raise UserError(f"{path} has profile version {record.get('version')}, this program reads version {PROFILE_VERSION}; {advice}")
    try:
        rows = [row_from_dict(row) for row in record["rows"] if row["key"] in NAMES]
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{path} is a damaged profile ({type(error).__name__}: {error}); {advice}") from error
    if not any(row.rates for row in rows):
        raise UserError(f"{path} holds no measured row; {advice}")
    return record, rows


def changes_table(changes: Sequence[Change], threshold: float) -> Table:
    """Medians, their ratio and the outcome."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.caption = f"decoded images/s; slower or faster: by more than {threshold:.0%}, and the ranges do not meet"
    table.add_column("row", overflow="fold")
    for name in ("before", "after", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    styles = {"slower": "bold red", "faster": "green", "same": ""}
    for change in changes:
        cells = (change.before.name, f"{change.before.median:,.1f}", f"{change.after.median:,.1f}", f"{change.ratio:.3f}")
        outcome = "" if change.outcome == "same" else change.outcome
        table.add_row(*(Text(cell, style=styles[change.outcome]) for cell in (*cells, outcome)))
    return table
