"""The words for figures, and the plain lines of a run: what a file or a pipe is given, and what stays above the dashboard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bce3s.progress.standing import ACCURACIES, Standing

_BLOCKS = "▁▂▃▄▅▆▇"  # a whole block would touch the row above


def duration(seconds: float | None) -> str:
    """'1:02:33', '0:12', or '–' where nothing is known."""
    if seconds is None:
        return "–"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def percent(value: float | None) -> str:
    """As `bce3s.metrics.format_percent`; behind that lies torch, whose import whoever only watches need not wait for."""
    return "n/a" if value is None else f"{value:.2f}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as blocks between their least and their largest; empty for fewer than two."""
    shown = values[-width:] if width > 0 else []
    if len(shown) < 2:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in shown)


def epoch_sentence(line: dict[str, Any], standing: Standing, *, with_rates: bool = True, with_time: bool = True) -> str:
    """Of an epoch's line; `standing` has been fed with it."""
    parts = [f"epoch {line['epoch'] + 1:>3}/{standing.epochs}", *_rates(line)[: None if with_rates else 1]]
    if line.get("all") is not None:
        parts += accuracy_words(line)
    if with_time and standing.left_s is not None:
        parts.append(f"{duration(standing.left_s)} left")
    return "  ".join(parts)


def position_sentence(standing: Standing) -> str:
    """Where a run is within its epoch, or within an evaluation."""
    parts = [f"epoch {min(standing.epoch + 1, standing.epochs or standing.epoch + 1):>3}/{standing.epochs}"]
    if standing.activity is not None:
        parts.append(f"{standing.activity.text} {standing.activity.done}/{standing.activity.total}")
    else:
        parts += [f"step {steps(standing)}", *_rates(standing.line)]
    if standing.left_s is not None:
        parts.append(f"{duration(standing.left_s)} left")
    return "  ".join(parts)


def steps(standing: Standing) -> str:
    """'40/97', or '40' of a log that does not say how many there are."""
    return f"{standing.step}/{standing.num_steps}" if standing.num_steps else f"{standing.step}"


def accuracy_words(figures: dict[str, Any]) -> list[str]:
    """'all 42.92', 'many 53.65' and so on."""
    return [f"{name} {percent(figures.get(name))}" for name in ACCURACIES]


def _rates(line: dict[str, Any]) -> list[str]:
    words = [f"loss {line['total']:.3f}"] if "total" in line else []
    words += [f"{line['images_per_s']:.0f} source images/s"] if "images_per_s" in line else []
    return words + ([f"data wait {line['data_wait_share']:.0%}"] if "data_wait_share" in line else [])
