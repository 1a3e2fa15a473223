"""What stays on the screen, in a file or in a job's log, and what is drawn in a real terminal."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bce3s.progress import Standing, TrainingProgress, is_live, training
from bce3s.runlog import read_json, read_metrics
from bce3s.train import StoppedError, Telling, Trainer
from tests.bce3s.progress.logs import epoch_line, lines_until, step_line
from tests.bce3s.progress.terminal import Terminal, begin_in
from tests.bce3s.train.runs import CONFIG, _StopAt
from tests.commands import finish, run

# 24 images in batches of 8: three steps an epoch, of which there are more than anybody waits for.
ENDLESS = ["--recipe", "cifar10lt_resnet20_40ep", "--epochs", "5000", "--precision", "fp32", "--device", "cpu", "--loader", "resident"]
FAST = ["--batch-size", "8", *(f"--set={name}" for name in ("data.image_size=16", "data.num_threads=1", "log_every=2", "eval_every=3"))]


def fed(lines: list[dict[str, Any]], **options: Any) -> str:
    file = io.StringIO()
    with TrainingProgress(Console(file=file, width=200), Standing(epochs=10), **options) as progress:
        for line in lines:
            progress.feed(line)
        with progress.activity("evaluating val", 3) as advance:
            for _ in range(3):
                advance()
    return file.getvalue()


def test_a_file_gets_a_line_an_epoch() -> None:
    assert [line[:12] for line in fed(lines_until(3, 39)).splitlines()] == ["epoch   1/10", "epoch   2/10", "epoch   3/10"]


def test_a_long_epoch_and_a_long_evaluation_show_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of its own: 50 s pass from one line or batch to the next, and life is shown after two minutes."""
    now_s = iter(range(0, 100_000, 50))
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(now_s)))
    shown = fed([step_line(0, step) for step in range(9, 100, 10)]).splitlines()
    assert [line.split("  ")[2] for line in shown] == ["step 30/100", "step 60/100", "step 90/100", "evaluating val 2/3"]


def test_quiet_is_silent() -> None:
    assert fed(lines_until(3, 39), quiet=True) == ""


def test_steps_are_counted_between_lines() -> None:
    progress = TrainingProgress(Console(file=io.StringIO()), Standing())
    progress.feed(step_line(0, 19))
    progress.advance(33)
    assert progress.standing.step == 33
    progress.feed(epoch_line(0))
    assert (progress.standing.epoch, progress.standing.step) == (1, 0)


def test_colour_that_is_forced_makes_no_terminal_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Console(file=io.StringIO()).is_terminal
    assert not is_live(Console(file=io.StringIO()))


# ---- whole runs


@pytest.fixture(scope="module")
def command(make_shards: Any) -> list[str]:
    shards = make_shards(train=(14, 7, 3), size=(16, 16), test=2)
    return ["fast-train", "--dataset", "cifar10-lt", "--shards", str(shards.root), *ENDLESS, *FAST]


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal(80, 24) as terminal:
        yield terminal


def test_a_terminal_shows_the_run_and_is_clean_after_an_interruption(command: list[str], terminal: Terminal, tmp_path: Path) -> None:
    process = begin_in(terminal, [*command, "--out", "run"], tmp_path)
    terminal.wait_for(lambda: "top-1, % of test" in terminal.text and "epoch   4/5000" in terminal.text)
    text = terminal.text
    frame = ("╭─ bce3s · resnet20-cifar · cifar10-lt · CPU, fp32 ─", "╰─ run ─")
    for expected in (*frame, "/5000", "total ", "joint ", "uniform ", "images/s", "views/s"):
        assert expected in text, text
    assert text.index("epoch   4/5000") < text.index("╭─")  # lines that stay lie above
    assert text.count("╭─") == 1, text  # each picture took the place of the one before
    assert not terminal.cursor_shown
    assert process.pid is not None
    terminal.type(b"\x03")
    os.kill(process.pid, signal.SIGINT)
    terminal.wait_for(lambda: "stopped by SIGINT" in terminal.text)
    assert b"^C" in terminal.raw
    assert not [line for line in terminal.overflows if "^C" in line]  # it would push the picture down, and its top would stay
    assert finish(process) == 0
    terminal.read()
    assert terminal.cursor_shown
    assert "╭─" not in terminal.text
    assert "epoch   4/5000" in terminal.text
    last = read_metrics(tmp_path / "run")[-1]
    assert (last["kind"], last["reason"].partition(" after")[0]) == ("stopped", "stopped by SIGINT")


def test_a_dumb_terminal_gets_plain_lines(command: list[str], terminal: Terminal, tmp_path: Path) -> None:
    process = begin_in(terminal, [*command, "--epochs", "1", "--out", "run"], tmp_path, TERM="dumb")
    terminal.wait_for(lambda: process.exitcode is not None)
    assert finish(process) == 0
    assert "epoch   1/1" in terminal.text
    assert b"\x1b" not in terminal.raw


def test_quiet_leaves_the_table_and_the_record_names_the_command(command: list[str], tmp_path: Path) -> None:
    found = run(*command, "--epochs", "1", "--out", "a run", "--quiet", cwd=tmp_path, variables={"FORCE_COLOR": "1"})
    assert found.returncode == 0, found.stderr
    assert "\x1b[?25l" not in found.stdout
    assert "last epoch" in found.stdout
    assert "images/s" not in found.stdout
    assert read_json(tmp_path / "a run" / "environment.json")["command"].endswith("--epochs 1 --out 'a run' --quiet")


def test_a_continuation_shows_what_was_before(make_shards: Any, tmp_path: Path) -> None:
    shards = make_shards(train=(14, 7, 3), size=(16, 16), test=2)
    config = replace(CONFIG, log_every=1, data=replace(CONFIG.data, batch_size=8))

    def train(resume: bool) -> TrainingProgress:
        seen: list[TrainingProgress] = []
        trainer = Trainer(config, shards, tmp_path / "run", Console(file=io.StringIO()), telling=Telling(quiet=True))
        evaluate = trainer._evaluate
        trainer._evaluate = lambda split, progress, **others: [seen.append(progress), evaluate(split, progress, **others)][1]  # type: ignore
        if resume:
            trainer.resume()
        else:
            trainer._stop = _StopAt(lambda: trainer.state.cursor.epoch == 2 and trainer.state.cursor.step == 2)
        try:
            trainer.fit()
        except StoppedError:
            assert not resume
        finally:
            trainer.close()
        return seen[0]

    stopped = train(resume=False).standing
    assert (stopped.epoch, stopped.step) == (2, 2)
    resumed = train(resume=True).standing
    assert len(resumed.trend("all")) == 4
    assert [line["kind"] for line in read_metrics(tmp_path / "run") if line["kind"] != "step"] == [*["epoch"] * 4, "summary"]
