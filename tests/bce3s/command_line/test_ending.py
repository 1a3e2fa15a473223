"""How commands end: the exit statuses of docs/cli.md, one sentence for every mistake, and not a word where a word would be noise."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bce3s.command_line.ending import BUG, CHECK_FAILED, DONE, INTERRUPTED, MISTAKE, PIPE_CLOSED, TRACEBACK_VARIABLE
from tests import commands

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "PYTHONUNBUFFERED": ""}  # as a user has it
INTERRUPT = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"


def ended(body: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script with one command, `body`, run as our commands and tools are."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (cwd / "script.py").write_text(
        "import typer\nfrom bce3s.cli import run_app\napp = typer.Typer(add_completion=False)\n"
        f"@app.command()\ndef work(number: int = 1) -> None:\n{lines}"
        "run_app(app)\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{cwd}", **variables}
    return subprocess.run([sys.executable, "script.py"], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ("print('done')", 0, None),
        ("import typer; raise typer.Exit(1)", 1, None),
        ("from pipelines.types import ShardError; raise ShardError('no shards at x; make them')", 2, "no shards at x; make them"),
        ("open('/sys/a.json', 'w')", 2, "/sys/a.json: Permission denied; ask for the permission"),
        ("with open('/dev/full', 'w') as file:\n    file.write('x')", 2, "No space left on device; make room there"),
        ("open('x' * 300)", 2, "File name too long; choose a shorter name"),
        ("raise MemoryError", 2, "the memory of this machine is full; close other programs"),
        (
            "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (8, 8))\nx = [open('script.py') for _ in range(9)]",
            2,
            "ulimit -n 65536",
        ),
        (INTERRUPT, 130, None),
        ("try:\n    " + INTERRUPT + "\nexcept KeyboardInterrupt:\n    raise ValueError('the loader died')", 130, None),
        ("raise SystemExit('as a library says it')", 2, None),
    ],
)
def test_every_ending_has_its_status_and_at_most_one_sentence(tmp_path: Path, body: str, status: int, sentence: str | None) -> None:
    found = ended(body, tmp_path)
    assert found.returncode == status, found.stderr
    assert "Traceback" not in found.stderr
    assert len(found.stderr.splitlines()) <= 1
    if sentence is not None:
        assert found.stderr.startswith("error: ")
        assert sentence in found.stderr


def test_a_bug_keeps_its_traceback_and_is_no_failed_check(tmp_path: Path) -> None:
    for body in ("{}['seed']", "open('absent')"):
        found = ended(body, tmp_path)
        assert found.returncode == 70
        assert found.stderr.startswith("Traceback")
        assert "this is a bug of bce3s" in found.stderr.splitlines()[-1]


def test_a_traceback_of_a_mistake_is_there_for_who_asks(tmp_path: Path) -> None:
    found = ended("from pipelines.types import ShardError; raise ShardError('no shards')", tmp_path, BCE3S_TRACEBACK="1")
    assert found.returncode == 2
    assert found.stderr.startswith("Traceback")
    assert found.stderr.splitlines()[-1] == "error: no shards"


def test_an_interrupted_import_ends_at_once_though_it_would_swallow_the_exception(tmp_path: Path) -> None:
    (tmp_path / "extension.py").write_text(f"try:\n    {INTERRUPT}\nexcept BaseException:\n    pass\n")
    found = ended("import extension\nprint('went on')", tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


def test_a_background_job_stays_deaf_to_the_interrupt_of_its_shell(tmp_path: Path) -> None:
    (tmp_path / "deaf.py").write_text("import signal, runpy; signal.signal(signal.SIGINT, signal.SIG_IGN); runpy.run_path('script.py')")
    ended(f"{INTERRUPT}\nprint('went on')", tmp_path)
    found = subprocess.run([sys.executable, "deaf.py"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "went on\n")


def loads(process: subprocess.Popen[str], library: str) -> bool:
    return library in Path(f"/proc/{process.pid}/maps").read_text()


def test_ctrl_c_while_a_command_imports_torch_is_silent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bce3s.cli", "evaluate", "absent"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not loads(process, "libtorch"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


STARTS = (("-m", "bce3s.cli", "evaluate", "absent"), ("-m", "bce3s.cli", "reproduce", "--list"), ("tools/verify_shards.py", "absent"))


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.3, 0.6, 0.9, 1.2, 1.5, 1.8])
@pytest.mark.parametrize("arguments", STARTS)
def test_ctrl_c_at_any_moment_of_the_start_is_silent(arguments: tuple[str, ...], delay_s: float) -> None:
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(delay_s)
    over = process.poll() is not None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert "Traceback" not in error
    assert over or process.returncode in (130, -signal.SIGINT)


def test_a_reader_that_goes_away_is_no_complaint() -> None:
    for options in (["--version"], ["reproduce", "--list"]):  # the one is printed by typer, the other by rich
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "bce3s.cli", *options]
        found = subprocess.run(command, env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
        os.close(write)
        assert (found.returncode, found.stderr) == (141, "")


def test_what_python_still_holds_for_a_reader_that_went_away_is_dropped(tmp_path: Path) -> None:
    ended("print('x')", tmp_path)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "script.py"]
    found = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (found.returncode, found.stderr) == (141, "")
    with open("/dev/full", "w") as full:
        found = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (found.returncode, found.stderr) == (2, "error: No space left on device; make room there, or name another place\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evalute"], "no such command 'evalute'; did you mean 'evaluate'?; see 'bce3s --help'"),
        (["fast-train", "--datset", "x"], "no such option --datset; did you mean --dataset?; see 'bce3s fast-train --help'"),
        (["fast-train", "--dataset", "demo", "--epochs", "many"], "invalid value for '--epochs'"),
        (["fast-train"], "missing option '--dataset'; see 'bce3s fast-train --help'"),
        (["fast-train", "--dataset", "cifar10", "--print-config"], "did you mean 'cifar10-lt'?"),
        (["fast-train", "--dataset", "demo", "--recipe", "demo_resnet20"], "did you mean 'demo_resnet20_12ep'?"),
        (["fast-train", "--dataset", "demo", "--set", "lr=1"], "did you mean 'optimizer.learning_rate'?"),
        (["fast-train", "--dataset", "demo", "--set", "data.order.sampler=x"], "did you mean 'data.order.sampling'?"),
        (["reproduce", "abalation-cifar100"], "did you mean 'ablation-cifar100'?"),
    ],
)
def test_a_misspelt_name_is_met_with_the_right_one(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    found = commands.run(*arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert sentence in found.stderr


def test_no_color_is_honoured(tmp_path: Path) -> None:
    for value, coloured in (("", True), ("1", False)):
        found = commands.run("fast-train", "--help", cwd=tmp_path, variables={"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": value})
        assert ("\x1b[1;36m" in found.stdout) == coloured


def test_the_page_lists_every_exit_status() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    listed = {int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert listed == {DONE, CHECK_FAILED, MISTAKE, BUG, INTERRUPTED, PIPE_CLOSED}
    assert f"`{TRACEBACK_VARIABLE}`" in page
