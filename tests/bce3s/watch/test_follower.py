"""A log is read as it grows: whole lines only, each once, and anew where a continuation rewrote it."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from bce3s.runlog import RunLog, read_metrics
from bce3s.watch.follower import LogFollower
from tests.bce3s.progress.logs import epoch_line, lines_until, step_line


def encoded(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def test_any_cut_of_the_file_gives_every_line_once(tmp_path: Path) -> None:
    lines, follower, draw = lines_until(2, 59), LogFollower(tmp_path), random.Random(0)
    assert follower.read() == ([], False)  # no file yet
    content, found = encoded(lines), []
    with (tmp_path / "metrics.jsonl").open("ab", buffering=0) as file:
        while content:
            size = draw.choice([1, 7, 300, 2000])
            file.write(content[:size])
            content = content[size:]
            new, anew = follower.read()
            assert not anew
            found += new
    assert found == lines


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, follower = tmp_path / "metrics.jsonl", LogFollower(tmp_path)
    path.write_bytes(encoded(lines_until(9, 99) * 50))
    follower.read()
    sizes: list[int] = []
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: _Counting(opened(self, *args), sizes))
    with opened(path, "ab") as file:
        file.write(encoded([epoch_line(9)]))
    assert follower.read() == ([epoch_line(9)], False)
    assert sum(sizes) < 1000


class _Counting:
    """A file that notes how much was read of it."""

    def __init__(self, file: Any, sizes: list[int]) -> None:
        self._file, self._sizes = file, sizes

    def __enter__(self) -> _Counting:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self) -> bytes:
        content: bytes = self._file.read()
        self._sizes.append(len(content))
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("kept", [0, 2, 7])
def test_a_log_that_a_continuation_cut_is_read_anew(tmp_path: Path, kept: int) -> None:
    """By the log's own class: steps behind the checkpoint are dropped, and written again with other figures."""
    follower = LogFollower(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(encoded(lines_until(1, 59)))
    assert len(follower.read()[0]) == 9
    epoch, step = divmod(kept, 6)
    with RunLog(tmp_path, epoch, 20 * step, lambda sentence: None) as log:
        again, anew = follower.read()
        assert anew
        assert again == read_metrics(tmp_path)
        log.write(step_line(1, 59, total=1.0))
        assert follower.read() == ([step_line(1, 59, total=1.0)], False)


def test_another_log_of_the_same_length_is_another_log(tmp_path: Path) -> None:
    follower = LogFollower(tmp_path)
    first, second = lines_until(0, 59), [{**line, "total": 3.25} for line in lines_until(0, 59)]
    first = [{**line, "total": 1.75} for line in first]
    assert len(encoded(first)) == len(encoded(second))
    (tmp_path / "metrics.jsonl").write_bytes(encoded(first))
    assert follower.read() == (first, False)
    (tmp_path / "metrics.jsonl").write_bytes(encoded(second))
    assert follower.read() == (second, True)
    (tmp_path / "metrics.jsonl").unlink()
    assert follower.read() == ([], True)
    assert follower.read() == ([], False)


def test_a_damaged_line_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "st\x00\x00\n[1]\n' + encoded([epoch_line(0)]))
    assert LogFollower(tmp_path).read() == ([epoch_line(0)], False)


def test_silence_is_as_old_as_the_last_line(tmp_path: Path) -> None:
    path, follower = tmp_path / "metrics.jsonl", LogFollower(tmp_path)
    path.write_bytes(encoded([epoch_line(0)]))
    os.utime(path, (time.time() - 1000, time.time() - 1000))
    follower.read()
    assert follower.silent_s == pytest.approx(1000, abs=5)
    with path.open("ab") as file:
        file.write(encoded([epoch_line(1)]))
    os.utime(path, (time.time() - 5000, time.time() - 5000))  # by a clock that goes wrong
    follower.read()
    assert follower.silent_s < 5
