"""Whole commands in processes of their own, forked from one that has imported the program: a start costs milliseconds, not seconds.

What is run is what a user runs, to the exit status; only the imports are done before. Tests of the start itself (that `--help` imports
no torch, say), or of another environment, start Python anew.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        *("bce3s.cli", "bce3s.launch", "bce3s.losses.bce3s", "bce3s.throughput.profile", "pipelines.loaders.resident"),
        *("bce3s.retrain.stage_two", "bce3s.evaluate.split", "bce3s.reproduce.session"),
        *("pipelines.conversion", "pipelines.datasets.folder", "rich.progress"),
        *("torch._inductor", "pipelines.loaders.resident_fill"),  # the optimizers import the one, the resident loader DALI
    ]
)


def begin(
    arguments: list[str],
    output: Path,
    errors: Path | None = None,
    *,
    program: str = "bce3s",
    cwd: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """A command that runs beside the test; what it prints goes to `output`, and what it complains of to `errors` or there too.

    Args:
        program: "bce3s", or the path of a script.
        variables: of its environment, beside or in place of the test's own.
    """
    places = (str(output), str(errors or output), str(cwd or Path.cwd()))
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), **(variables or {})}
    process = _PROCESSES.Process(target=_become, args=(program, arguments, *places, environment))
    process.start()
    return process


def finish(process: ForkServerProcess, timeout_s: float = 120.0) -> int:
    """Its exit status; −9 after a kill."""
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the command did not end")
    return process.exitcode


def finish_together(target: Callable[..., None], arguments: list[tuple[Any, ...]], timeout_s: float = 120.0) -> list[int | None]:
    """One process for each of the arguments, all at once; their exit statuses, None for one that did not end."""
    processes = [_PROCESSES.Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


def run(*arguments: str, cwd: Path, program: str = "bce3s", variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command to its end."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        status = finish(begin(list(arguments), output, errors, program=program, cwd=cwd, variables=variables))
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in (output, errors))
        return subprocess.CompletedProcess([program, *arguments], status, *texts)


def _become(program: str, arguments: list[str], output: str, errors: str, cwd: str, environment: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, output), (2, errors)):
        with open(name, "ab") as file:
            os.dup2(file.fileno(), number)
    warnings.simplefilter("error")
    try:
        if program == "bce3s":
            from bce3s.cli import main

            main(arguments)
        else:
            sys.argv = [program, *arguments]
            runpy.run_path(program, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
