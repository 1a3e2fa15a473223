"""The picture of a running run on a terminal: never wider or higher than it is, and with more in it where there is room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bce3s.progress.sentences import accuracy_words, duration, percent, sparkline, steps
from bce3s.progress.standing import ACCURACIES, Standing

SHOWN_TERMS = ("total", "joint", "contrastive", "uniform")
_MAX_TERMS = 5
_GIB = float(1 << 30)
# Below these, a few plain lines instead; from `_WIDE` columns on the speed has a column of its own.
_LEAST_WIDTH, _LEAST_HEIGHT, _WIDE = 60, 17, 110
_FRAME = 4  # columns that the frame and its padding take
_Row = tuple[str, str, Sequence[float] | str]  # name, value, and a trend or a word behind it


class Dashboard:
    """Draws a `Standing` as it is at that moment."""

    def __init__(self, standing: Standing) -> None:
        """Draws `standing`, which may be replaced."""
        self.standing = standing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The whole picture, in a few lines where the terminal is small."""
        ascii_only = options.ascii_only
        if options.max_width < _LEAST_WIDTH or console.height < _LEAST_HEIGHT:
            yield Group(*_small(self.standing, ascii_only))
            return
        yield _large(self.standing, options.max_width, ascii_only)


def _large(standing: Standing, width: int, ascii_only: bool) -> Panel:
    wide, inner = width >= _WIDE, width - _FRAME
    count = 3 if wide else 2
    column = (inner - 3 * (count - 1)) // count
    figures = [_losses(standing, column, ascii_only), _accuracies(standing, column, ascii_only)]
    if wide:
        figures.append(_speed(standing, column, ascii_only))
    # Not as rich's tables: those cost three times as much, and the picture is drawn while the run trains.
    blank = Text(" " * column)
    side_by_side = [Text("   ").join(line) for line in zip_longest(*figures, fillvalue=blank)]
    rows: list[RenderableType] = [_bars(standing, ascii_only), Text(), *side_by_side]
    if not wide:
        rows += [Text(), _cut("  ".join(_speed_words(standing)), ascii_only)]
    if standing.notice:
        rows.append(_cut(standing.notice, ascii_only, style="bold red"))
    title = _plain(" · ".join(filter(None, [standing.title, standing.place])), ascii_only)
    return Panel(
        Group(*rows),
        box=box.ROUNDED,
        title=Text(title[: inner - 2], style="bold not dim"),
        title_align="left",
        subtitle=Text(_end_of(standing.folder, inner - 2, ascii_only), style="dim"),
        subtitle_align="left",
        border_style="dim",
    )


def _small(standing: Standing, ascii_only: bool) -> list[RenderableType]:
    """Three or four lines."""
    epoch = f"epoch {_epoch_number(standing)}/{standing.epochs}"
    where = [epoch, _within_epoch(standing), f"{duration(standing.left_s)} left"]
    terms = [f"{name} {standing.terms[name]:.3f}" for name in _shown_terms(standing)]
    lines = [where, [*_speed_words(standing)[:1], *terms], accuracy_words(standing.accuracies) if standing.accuracies else []]
    texts = ["  ".join(words) for words in lines if words] + ([standing.notice] if standing.notice else [])
    return [_cut(text, ascii_only) for text in texts]


def _bars(standing: Standing, ascii_only: bool) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(no_wrap=True, min_width=5)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, min_width=18)
    grid.add_column(no_wrap=True, justify="right", min_width=12)
    run, epoch = f"epoch {_epoch_number(standing)}/{standing.epochs}", _within_epoch(standing)
    activity = standing.activity
    done, total = (activity.done, activity.total) if activity else (standing.step, standing.num_steps)
    left = _left(None if activity else standing.epoch_left_s)
    if standing.summary is not None:
        epoch, done, total, left = "finished", 1, 1, ""
    grid.add_row("run", ProgressBar(1.0, standing.share_done), run, _plain(_left(standing.left_s), ascii_only))
    grid.add_row("epoch", ProgressBar(max(1, total), min(done, max(1, total))), epoch, _plain(left, ascii_only))
    return grid


def _losses(standing: Standing, width: int, ascii_only: bool) -> list[Text]:
    rows = [(name, f"{standing.terms[name]:.3f}", standing.trend(name)) for name in _shown_terms(standing)]
    heading = f"loss, {'by step' if standing.by_step else 'by epoch'}"
    return _figures(heading if rows else "loss: no line yet", rows, width, ascii_only)


def _accuracies(standing: Standing, width: int, ascii_only: bool) -> list[Text]:
    if not standing.accuracies:
        return _figures("top-1: not evaluated yet", [], width, ascii_only)
    rows = [(name, percent(standing.accuracies[name]), standing.trend(name)) for name in ACCURACIES]
    heading = f"top-1, % of {standing.split}, epoch {standing.accuracies_of + 1}"
    if standing.best is not None and standing.best[1] != standing.accuracies_of:
        best = f" (best {standing.best[0]:.2f}, {standing.best[1] + 1})"
        heading += best if len(heading + best) <= width else ""
    return _figures(heading, rows, width, ascii_only)


def _speed(standing: Standing, width: int, ascii_only: bool) -> list[Text]:
    line = standing.line
    rows: list[_Row] = []
    if "images_per_s" in line:
        rows.append(("images/s", f"{line['images_per_s']:,.0f}", standing.trend("images_per_s")))
    if "views_per_s" in line:
        rows.append(("views/s", f"{line['views_per_s']:,.0f}", ()))
    if "data_wait_share" in line:
        rows.append(("data wait", f"{line['data_wait_share']:.0%}", standing.trend("data_wait_share")))
    if standing.device_memory_bytes:
        rows.append(("GPU memory", f"{standing.device_memory_bytes / _GIB:.1f}", _of_total(standing)))
    if standing.device_busy_percent is not None:
        rows.append(("GPU busy", f"{standing.device_busy_percent}%", ()))
    return _figures("speed", rows, width, ascii_only)


def _figures(heading: str, rows: Sequence[_Row], width: int, ascii_only: bool) -> list[Text]:
    """A heading over rows of name, value and trend, the trend as long as there is room; every line is `width` wide."""
    names = max((len(name) for name, _, _ in rows), default=0)
    lines = [Text(_plain(heading, ascii_only)[:width].ljust(width), style="bold")]
    for name, value, trend in rows:
        head = f"{name:<{names}} {value:>8} "
        room = max(0, width - len(head))
        shown = trend if isinstance(trend, str) else "" if ascii_only else sparkline(trend, room)
        lines.append(Text.assemble(head[:width], (shown[:room].ljust(room), "cyan" if shown is not trend else "")))
    return lines


def _speed_words(standing: Standing) -> list[str]:
    line = standing.line
    words = [f"{line['images_per_s']:,.0f} images/s"] if "images_per_s" in line else []
    words += [f"{line['views_per_s']:,.0f} views/s"] if "views_per_s" in line else []
    words += [f"data wait {line['data_wait_share']:.0%}"] if "data_wait_share" in line else []
    if standing.device_memory_bytes:
        words.append(f"GPU {standing.device_memory_bytes / _GIB:.1f} {_of_total(standing)}")
    return words + ([f"{standing.device_busy_percent}% busy"] if standing.device_busy_percent is not None else [])


def _of_total(standing: Standing) -> str:
    total = standing.device_memory_total_bytes
    return f"of {total / _GIB:.1f} GiB" if total else "GiB"


def _shown_terms(standing: Standing) -> list[str]:
    known = [name for name in SHOWN_TERMS if name in standing.terms]
    return (known + [name for name in standing.terms if name not in SHOWN_TERMS])[:_MAX_TERMS]


def _epoch_number(standing: Standing) -> int:
    """Of the epoch in progress, as people count."""
    return min(standing.epoch + 1, standing.epochs or standing.epoch + 1)


def _within_epoch(standing: Standing) -> str:
    if standing.activity is not None:
        return f"{standing.activity.text} {standing.activity.done}/{standing.activity.total}"
    return f"step {steps(standing)}"


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{duration(seconds)} left"


def _cut(text: str, ascii_only: bool, style: str = "") -> Text:
    """One line, cut where the terminal ends."""
    return Text(_plain(text, ascii_only), style=style, no_wrap=True, overflow="crop" if ascii_only else "ellipsis")


def _plain(text: str, ascii_only: bool) -> str:
    """For a terminal that knows no more, letters that it has."""
    return text.replace("·", "-").replace("–", "-").encode("ascii", "replace").decode() if ascii_only else text


def _end_of(path: str, width: int, ascii_only: bool) -> str:
    """A path cut at its beginning: its end says which run it is."""
    mark = "..." if ascii_only else "…"
    return _plain(path if len(path) <= width else mark + path[-(width - len(mark)) :], ascii_only)
