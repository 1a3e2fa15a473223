"""Starts the probes, all at once, and waits for them; one that dies or does not answer is a finding like any other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

Facts = dict[str, dict[str, Any]]
_CODE = "import sys; from bce3s.doctor.probes import main; main(sys.argv[1:])"


def probe(groups: Sequence[Sequence[str]], timeout_s: float) -> Facts:
    """What was found about each subject.

    Args:
        groups: subjects (`probes.main`) that share a process; groups run beside each other.
        timeout_s: for all of them together.

    Returns:
        Subject → its facts; {"error": …} where it failed, crashed its process or did not answer in time. The subjects behind one that
        crashed are tried again, in a process of their own.
    """
    deadline_s = time.monotonic() + timeout_s
    facts: Facts = {}
    waiting = [list(group) for group in groups if group]
    while waiting:
        started = [(group, *_start(group)) for group in waiting]
        waiting = []
        try:
            for group, process, output in started:
                died = _wait(process, deadline_s)
                output.seek(0)
                left = _read(group, output.read().decode(errors="replace"), died, facts)
                if left:
                    waiting.append(left)
        finally:
            for _, process, output in started:  # of an interrupt, which their own sessions do not hear
                _end(process)
                output.close()
    return facts


def _start(group: list[str]) -> tuple[subprocess.Popen[bytes], Any]:
    # A file, not a pipe: nobody needs to read while it runs, and a grandchild that lives on holds nobody up.
    output = tempfile.TemporaryFile()
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE, *group],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        cwd="/",  # -c puts the working folder in front of the path, where a torch.py would be taken for torch
        start_new_session=True,
    )
    return process, output


def _environment() -> Mapping[str, str]:
    """Sees the packages that this process sees; its threads do not fight for the cores."""
    path = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _wait(process: subprocess.Popen[bytes], deadline_s: float) -> str:
    """Waits, no longer than until then; how the process died, empty where it ended well."""
    try:
        status = process.wait(max(0.0, deadline_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        _end(process)
        return "does not answer"
    if status < 0:
        return f"crashes ({signal.Signals(-status).name})"
    return "" if status == 0 else f"ends its process with status {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(group: list[str], output: str, died: str, facts: Facts) -> list[str]:
    """Takes the facts of one process over; returns the subjects that it did not come to."""
    begun = ""
    for line in output.splitlines():
        try:
            found = json.loads(line)
            subject = found.pop("subject")
        except (ValueError, KeyError, AttributeError, TypeError):
            continue  # something else wrote to standard output
        if found.pop("begun", False):
            begun = subject
        else:
            facts[subject], begun = found, ""
    names = [subject.partition(" ")[0] for subject in group]
    if not died:
        died = "does not answer"
    blamed = begun or next((name for name in names if name not in facts), "")
    if blamed:
        facts[blamed] = {"error": died}
    # One that never answers has used up everybody's time; what crashed at once may be followed by what does not.
    left = [subject for subject, name in zip(group, names, strict=True) if name not in facts]
    if died == "does not answer":
        facts.update({subject.partition(" ")[0]: {"error": died} for subject in left})
        return []
    return left
