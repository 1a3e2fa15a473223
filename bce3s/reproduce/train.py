"""Training the runs of a table: one after the other in this process, or several at a time in processes of their own."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from bce3s.interrupt import StopRequest
from bce3s.launch import Launch, launch
from bce3s.reproduce.runs import RECORD_FILE, Run, read_record
from bce3s.throughput.record import checkout_commit, hardware
from pipelines.durable import write_atomically
from pipelines.types import ShardError, UserError

Told = Callable[[Run], None]
_POLL_S = 0.2
_LOCK_PATIENCE_S = 30.0  # a large network takes its time to be saved
_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


class RunFailedError(UserError):
    """A run of the grid did not end well; the sentence says where it wrote why."""


def train(run: Run) -> None:
    """Trains one run in this process, from wherever it is; a request to stop leaves it unfinished and saved.

    Raises:
        UserError: what `launch` raises, or another process trains the run.
    """
    with _locked(run):
        if run.finished:
            return
        begins = not run.out.exists() or (run.out.is_dir() and not any(run.out.iterdir()))
        device = torch.device("cuda" if torch.cuda.is_available() and run.config.device != "cpu" else "cpu")
        # Written now, not at the end: the checkout may move on meanwhile, and a run that is killed went through this commit too.
        commits = [commit for commit in (*read_record(run).get("commits", []), checkout_commit()) if commit is not None]
        record: dict[str, Any] = {"commits": list(dict.fromkeys(commits)), "hardware": hardware(device)}
        _note(run, record)
        started_s = time.monotonic()
        asked = Launch(shards=run.shards, out=run.out, resume=True, overwrite=False, stages=run.stages, arguments=run.command())
        launch(run.config, asked)
        # Of a run that was stopped in between nobody can say how long it would have taken.
        _note(run, {**record, "wall_s": time.monotonic() - started_s if begins and run.finished else None})


def _note(run: Run, record: dict[str, Any]) -> None:
    """Keeps what is known of a run beside it.

    Raises:
        ShardError: the folder cannot be written.
    """
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        write_atomically(run.out / RECORD_FILE, json.dumps(record, indent=1).encode())
    except OSError as error:
        raise ShardError(f"cannot write to {run.out}: {error.strerror or error}; choose another --out") from error


@contextmanager
def _locked(run: Run) -> Iterator[None]:
    """One process a run: another that is just saving it before it ends is waited for, one that trains on is not.

    Raises:
        ShardError: the folder cannot be written.
        RunFailedError: another process trains the run.
    """
    place = run.out.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = (place / f"{run.name}.lock").open("ab")
    except OSError as error:
        raise ShardError(f"cannot write to {place}: {error.strerror or error}; choose another --out") from error
    with file:
        deadline_s = time.monotonic() + _LOCK_PATIENCE_S
        while not _lock(file.fileno()):
            if time.monotonic() > deadline_s:
                raise RunFailedError(f"another process trains {run.out}; wait for it or end it")
            time.sleep(_POLL_S)
        yield


def _lock(descriptor: int) -> bool:
    """Takes the lock if nobody has it; a disk that knows no locks is taken as it is."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def train_here(runs: list[Run], stop: StopRequest, on_start: Told, on_end: Told) -> list[str]:
    """Trains the runs one by one in this process until one is stopped; returns a sentence for each that failed."""
    failed = []
    for run in runs:
        if stop.name is not None:
            break
        on_start(run)
        try:
            train(run)
        except UserError as error:
            failed.append(f"{run.name}: {error}")
            continue
        if not run.finished:
            break
        on_end(run)
    return failed


def train_beside(
    runs: list[Run],
    jobs: int,
    stop: StopRequest,
    on_start: Callable[[Run], None],
    on_end: Callable[[Run], None],
    on_poll: Callable[[Sequence[str]], None],
) -> list[str]:
    """Trains `jobs` runs at a time in processes of their own, each with its share of the cores; what they say goes to OUT/runs/RUN.log.

    Returns:
        A sentence for each that failed. On a request to stop they are asked too, and waited for until they are saved.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    processes = multiprocessing.get_context("spawn")
    failed: list[str] = []
    waiting, asked = list(runs), False
    going: dict[str, tuple[Run, SpawnProcess]] = {}
    while going or (waiting and stop.name is None):
        while waiting and len(going) < jobs and stop.name is None:
            run = waiting.pop(0)
            run.out.parent.mkdir(parents=True, exist_ok=True)
            process = processes.Process(target=_train_in_child, args=(run, log_of(run), os.getpid()))
            process.start()
            going[run.name] = (run, process)
            on_start(run)
        if stop.name is not None and not asked:
            asked = True
            for _, process in going.values():
                process.terminate()
        for run, process in list(going.values()):
            process.join(_POLL_S / len(going))
            if process.exitcode is None:
                continue
            del going[run.name]
            if process.exitcode and not asked:
                failed.append(f"{run.name}: {_last_words(log_of(run), process.exitcode)}")
            elif run.finished:
                on_end(run)
            elif not asked:
                stop.name = "a signal to one of the runs"  # Ctrl-C reaches all of them
        on_poll(list(going))
    return failed


def log_of(run: Run) -> Path:
    """Where a run in a process of its own says what it has to say."""
    return run.out.parent / f"{run.name}.log"


def _last_words(log: Path, status: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    said = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    return f"{said} (exit status {status}; all of it in {log})"


def _train_in_child(run: Run, log: Path, parent: int) -> None:
    _end_with(parent)
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        train(run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def _end_with(parent: int) -> None:
    """A parent that is killed asks this process to stop, so that none trains on unseen beside the command that continues."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # too late to be told
            sys.exit(1)
