"""The picture fits every terminal, whatever there is to show."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bce3s.progress import Standing
from bce3s.progress.dashboard import Dashboard
from bce3s.progress.standing import Activity
from tests.bce3s.progress.logs import ENVIRONMENT, SUMMARY, lines_until, step_line, write_run


def drawn(standing: Standing, width: int, height: int, **options: Any) -> list[str]:
    file = options.pop("file", io.StringIO())
    console = Console(file=file, width=width, height=height, force_terminal=True, **{"no_color": True, "highlight": False, **options})
    with console.capture() as capture:
        console.print(Dashboard(standing), style="none")
    return capture.get().splitlines()


@pytest.fixture
def standing(tmp_path: Path) -> Standing:
    standing = Standing.of_folder(write_run(tmp_path, []))
    for line in lines_until(5, 39):
        standing.feed(line)
    standing.device_busy_percent = 93
    return standing


EMPTY, MANY_TERMS, ENDED = "empty", "many terms", "ended"


@pytest.mark.parametrize("state", ["usual", EMPTY, MANY_TERMS, ENDED])
def test_it_is_never_wider_or_higher_than_the_terminal(standing: Standing, tmp_path: Path, state: str) -> None:
    if state == EMPTY:
        standing = Standing()
    elif state == MANY_TERMS:
        standing.feed(step_line(5, 59, **{f"a-term-with-a-long-name-{n}": 123456.789 for n in range(9)}, images_per_s=1e9, views_per_s=3e9))
        standing.activity = Activity("evaluating a split of a long name", 123456, 12345)
        standing.notice, standing.folder, standing.title = "a long notice " * 20, "/a/long/path" * 30, "a title " * 40
    elif state == ENDED:
        standing.feed(SUMMARY)
    for width in (1, 10, 40, 59, 60, 61, 80, 109, 110, 111, 160, 250):
        for height in (5, 16, 17, 24, 50):
            lines = drawn(standing, width, height, color_system=None)
            assert max(map(len, lines)) <= width, (width, height)
            assert len(lines) <= height - 1, (width, height)


def test_80_by_24_shows_what_matters(standing: Standing) -> None:
    text = "\n".join(drawn(standing, 80, 24, color_system=None))
    for expected in (
        *("bce3s · resnet32-cifar · cifar10-lt · NVIDIA H100, bf16", "epoch 6/10", "step 40/100", "0:30 left", "4:02 left"),
        *("1,000 images/s  3,000 views/s  data wait 2%  GPU 3.0 of 80.0 GiB  93% busy", "loss, by epoch", "top-1, % of val, epoch 4"),
        *("total      3.610 ▇▅▄▃▁", "all       43.00", "few         n/a", standing.folder[-60:]),
    ):
        assert expected in text, text


def test_a_wide_terminal_shows_more(standing: Standing) -> None:
    narrow, wide = ("\n".join(drawn(standing, width, 50, color_system=None)) for width in (100, 160))
    assert "GPU busy        93%" in wide
    assert "GPU busy" not in narrow


def test_an_evaluation_takes_the_place_of_the_steps(standing: Standing) -> None:
    standing.activity = Activity("evaluating val", 40, 12)
    text = "\n".join(drawn(standing, 80, 24, color_system=None))
    assert "evaluating val 12/40" in text
    assert "step 40/100" not in text


def test_a_few_lines_are_enough_for_a_small_window(standing: Standing) -> None:
    assert drawn(standing, 100, 10, color_system=None) == [
        "epoch 6/10  step 40/100  4:02 left",
        "1,000 images/s  total 3.610  joint 2.500  uniform 6.500",
        "all 43.00  many 50.00  medium 20.00  few n/a",
    ]


def test_no_color_leaves_no_colour(standing: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = "\n".join(drawn(standing, 80, 24, no_color=False, color_system="truecolor"))
    monkeypatch.setenv("NO_COLOR", "1")
    plain = "\n".join(drawn(standing, 80, 24, no_color=None, color_system="truecolor"))
    assert "\x1b[36m" in coloured
    assert all(sequence not in plain for sequence in ("\x1b[3", "\x1b[38", "\x1b[9"))


def test_a_terminal_without_unicode_gets_what_it_can_show(standing: Standing) -> None:
    standing.folder += "/größe"
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for width, height in ((80, 24), (160, 50), (40, 24)):
        console = Console(file=file, width=width, height=height, force_terminal=True, color_system=None)
        console.print(Dashboard(standing))
    file.flush()
    assert b"epoch 6/10" in file.buffer.getvalue()  # type: ignore[attr-defined]


def test_nothing_is_said_of_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    standing = Standing.of_folder(write_run(tmp_path, [], **{**ENVIRONMENT, "gpu": None, "gpu_memory_bytes": None}))
    standing.feed({name: value for name, value in step_line(0, 19).items() if name != "device_memory_bytes"})
    assert "GPU" not in "\n".join(drawn(standing, 160, 50, color_system=None))
