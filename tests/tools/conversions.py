"""What the tests of the converter share: the command as a process of its own, pictures to convert, small disks, what is left running."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import commands

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools" / "make_shards.py")
FOLDER = ("--dataset", "folder", "--source", "photos")
ALL_TRAIN = (*FOLDER, "--val-fraction", "0", "--test-fraction", "0")


def tool_environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1", **variables}


def convert(*arguments: str, cwd: Path, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end; it must not warn."""
    variables = variables or {}
    if not any(name.startswith(("LC_", "LANG", "PYTHON", "HF_")) for name in variables):  # read when Python or a library starts
        return commands.run(*arguments, cwd=cwd, program=TOOL, variables=variables)
    command = [sys.executable, "-W", "error", TOOL, *arguments]
    environment = tool_environment(**variables)
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=120, check=False
    )


def must_convert(*arguments: str, cwd: Path, variables: Mapping[str, str] | None = None) -> str:
    """Runs the command, which must succeed; returns what it printed."""
    found = convert(*arguments, cwd=cwd, variables=variables)
    assert found.returncode == 0, found.stderr
    assert all(line.startswith("warning: ") for line in found.stderr.splitlines()), found.stderr
    return found.stdout


def refusal(*arguments: str, cwd: Path, variables: Mapping[str, str] | None = None) -> str:
    """Runs the command, which must fail as a user's mistake does: one sentence, no traceback; returns the sentence."""
    found = convert(*arguments, cwd=cwd, variables=variables)
    assert found.returncode == 2, found.stdout + found.stderr
    lines = [line for line in found.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, found.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """The command as the leader of a process group of its own."""
    command = [sys.executable, TOOL, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=tool_environment(), start_new_session=True, **pipes)  # type: ignore[call-overload,no-any-return]


def last_words(process: subprocess.Popen[str]) -> str:
    """What a process that is about to end says on standard error; neither it nor a worker of it may stay."""
    try:
        _, said = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:  # a worker that lives on keeps the pipe open
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise AssertionError(f"process {process.pid} or one of its workers did not end") from None
    assert_none_left(process.pid)
    return said


def living(group: int) -> list[int]:
    """Processes of a process group that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def assert_none_left(group: int) -> None:
    """Workers of a run that has ended must go too, soon."""
    deadline_s = time.monotonic() + 5
    while living(group) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    orphans = living(group)
    if orphans:
        os.killpg(group, signal.SIGKILL)
    assert not orphans


def fast_first(cases: Iterable[str], number: int) -> list[object]:
    """All but the first few are for the slow run: each takes a process of its own."""
    return [case if position < number else pytest.param(case, marks=pytest.mark.slow) for position, case in enumerate(cases)]


def photo_folder(root: Path, counts: Mapping[str, int], size: int = 24) -> Path:
    """Noise, `size` pixels a side, in a folder a class."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(root / name / f"{number}.jpg")
    return root


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own in memory at `folder`; skips where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a small disk is not permitted here ({error})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
