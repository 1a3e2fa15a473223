"""`bce3s watch` beside real runs: that end, that are killed, that go on, and that are several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bce3s.progress.logs import SUMMARY, lines_until, step_line, write_run
from tests.bce3s.progress.terminal import Terminal, begin_in
from tests.bce3s.train.runs import wait_until
from tests.commands import ROOT, begin, finish, run


def append(folder: Path, *lines: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_killed_run_that_goes_on_is_followed_to_its_end(make_shards: Any, tmp_path: Path) -> None:
    shards = make_shards(train=(14, 7, 3), size=(16, 16), test=2)
    settings = ("data.image_size=16", "data.num_threads=1", "log_every=1")
    arguments = ["fast-train", "--dataset", "cifar10-lt", "--shards", str(shards.root), "--recipe", "cifar10lt_resnet20_40ep"]
    arguments += ["--epochs", "6", "--precision", "fp32", "--device", "cpu", "--loader", "resident", "--batch-size", "8", "--out", "run"]
    arguments += ["--checkpoint-every", "1steps", *(f"--set={setting}" for setting in settings)]
    watched, log = tmp_path / "watched.txt", tmp_path / "run" / "metrics.jsonl"
    training = begin(arguments, tmp_path / "training.txt", cwd=tmp_path)
    wait_until(lambda: log.is_file() and b'"epoch"' in log.read_bytes())
    watching = begin(["watch", "run", "--interval", "0.05"], watched, cwd=tmp_path)
    wait_until(lambda: watched.is_file() and "epoch   2/6" in watched.read_text())
    training.kill()
    assert finish(training) == -9
    assert run(*arguments, "--resume", cwd=tmp_path).returncode == 0
    assert finish(watching) == 0
    lines = watched.read_text().splitlines()
    assert lines[0] == "following run"
    # Said only where lines that were shown are void: a kill after the save of the last step leaves none.
    assert sum("the run goes on after" in line for line in lines) <= 1
    assert [line.split("  ")[1] for line in lines if line.startswith("epoch ")][-1] == " 6/6"
    assert lines[-1].startswith("finished: run  last epoch no TTA, % of test:  all ")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_run_is_shown_until_its_summary(tmp_path: Path, is_terminal: bool) -> None:
    folder = write_run(tmp_path / "run", lines_until(3, 39))
    with Terminal(72, 30) as terminal:
        process = begin_in(terminal, ["watch", "run", "--interval", "0.05"], tmp_path, **({} if is_terminal else {"TERM": "dumb"}))
        if is_terminal:
            terminal.wait_for(lambda: "step 40/100" in terminal.text)
            assert "╭─ bce3s · resnet32-cifar · cifar10-lt · NVIDIA H100, bf16 ─" in terminal.text
            append(folder, step_line(3, 59))
            terminal.wait_for(lambda: "step 60/100" in terminal.text)
        terminal.wait_for(lambda: "epoch   3/10" in terminal.text)
        append(folder, SUMMARY)
        terminal.wait_for(lambda: "finished: run" in terminal.text)
        assert finish(process) == 0
        terminal.read()
        assert terminal.text.endswith("all 54.70  many 60.00  medium 40.00  few n/a")
        assert not is_terminal or [line for line in terminal.overflows if not line.startswith("finished")] == []
        assert terminal.cursor_shown
        assert terminal.text.count("╭─") == is_terminal  # the last picture stays


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_whoever_stops_watching_gets_the_terminal_back(tmp_path: Path, number: int, status: int) -> None:
    write_run(tmp_path / "run", lines_until(3, 39))
    with Terminal(80, 24) as terminal:
        process = begin_in(terminal, ["watch", "run"], tmp_path)
        terminal.wait_for(lambda: "step 40/100" in terminal.text)
        assert not terminal.cursor_shown
        assert process.pid is not None
        os.kill(process.pid, number)
        assert finish(process) == status
        terminal.read()
        assert terminal.cursor_shown
        assert "╭─" not in terminal.text
        assert "Traceback" not in terminal.text


def test_an_old_silence_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines_until(3, 39))
    assert "gone" not in run("watch", "run", "--once", cwd=tmp_path).stdout
    os.utime(folder / "metrics.jsonl", (time.time() - 420, time.time() - 420))
    found = run("watch", "run", "--once", cwd=tmp_path)
    assert found.returncode == 0
    assert found.stdout.splitlines() == [
        "run  epoch   4/10  step 40/100  loss 5.610  1000 source images/s  data wait 2%  0:00 left",
        "top-1, % of val, epoch 2:  all 41.00  many 50.00  medium 20.00  few n/a",
        "no line for 7 min; the process may be gone",
    ]


def test_a_run_of_slow_steps_is_given_time(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [step_line(0, 19, epoch_s=20 * 60.0)])  # a line in 20 minutes
    os.utime(folder / "metrics.jsonl", (time.time() - 3600, time.time() - 3600))
    assert "gone" not in run("watch", "run", "--once", cwd=tmp_path).stdout


def test_a_stop_and_a_broken_loss_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines_until(3, 39))
    append(folder, {"kind": "stopped", "epoch": 3, "step": 40, "reason": "stopped by SIGTERM after step 40 of epoch 4"})
    found = run("watch", "run", "--once", cwd=tmp_path)
    assert "stopped by SIGTERM after step 40 of epoch 4; --resume goes on from the last save" in found.stdout
    write_run(folder, [*lines_until(3, 39), {"kind": "broken", "epoch": 3, "step": 45, "ids": [1]}])
    for options in ((), ("--once",)):
        found = run("watch", "run", *options, cwd=tmp_path)
        assert found.returncode == 1
        assert found.stdout.splitlines()[-1] == "the loss is not finite from step 46 of epoch 4 on"


def test_the_runs_of_several_seeds_are_followed_one_after_the_other(tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    write_run(seeds / "s0", [*lines_until(10, -1), SUMMARY])
    shown = tmp_path / "watched.txt"
    process = begin(["watch", "seeds", "--interval", "0.05"], shown, cwd=tmp_path)
    wait_until(lambda: shown.is_file() and "epoch  10/10" in shown.read_text())
    write_run(seeds / "s1", lines_until(1, -1))
    wait_until(lambda: "following seeds/s1" in shown.read_text())
    append(seeds / "s1", SUMMARY)
    (seeds / "seeds.json").write_text("{}")
    assert finish(process) == 0
    lines = [line for line in shown.read_text().splitlines() if not line.startswith("epoch")]
    assert [line.partition("  ")[0] for line in lines] == [
        *("following seeds/s0", "finished: seeds/s0", "following seeds/s1", "finished: seeds/s1")
    ]


def test_watching_needs_no_torch() -> None:
    """On a login node its import takes longer than the look."""
    code = "import sys, bce3s.watch.watching; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("nowhere", "there is no folder nowhere: name that of a run"),
        (".", "holds no run yet: it has no environment.json"),
        ("note.txt", "note.txt is a file; name the folder of a run"),
        ("runs", "runs is no run folder but holds 2; name one, as in 'bce3s watch runs/bce'"),
    ],
)
def test_where_there_is_no_run_one_sentence_says_so(tmp_path: Path, folder: str, sentence: str) -> None:
    (tmp_path / "note.txt").write_text("mine")
    for name in ("bce", "ce"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "environment.json").write_text("{}")
    found = run("watch", folder, cwd=tmp_path)
    assert found.returncode == 2
    assert sentence in found.stderr
    assert len(found.stderr.splitlines()) == 1
