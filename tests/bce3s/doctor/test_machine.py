"""Cores, limits and disks, as this process sees them."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from bce3s.doctor import machine
from bce3s.doctor.disk import disk_row, read_speed
from bce3s.doctor.machine import machine_rows, quota_cores, usable_cores


def test_the_quota_is_the_least_of_the_groups_from_here_up(tmp_path: Path) -> None:
    inner = tmp_path / "user.slice" / "job"
    inner.mkdir(parents=True)
    assert quota_cores(tmp_path, "/user.slice/job") is None
    (inner / "cpu.max").write_text("max 100000\n")
    assert quota_cores(tmp_path, "/user.slice/job") is None
    (tmp_path / "user.slice" / "cpu.max").write_text("150000 100000\n")
    assert quota_cores(tmp_path, "/user.slice/job") == 1.5
    (tmp_path / "cpu.max").write_text("800000 100000\n")
    assert quota_cores(tmp_path, "/user.slice/job") == 1.5
    assert quota_cores(tmp_path, "/") == 8.0


def test_the_quota_of_version_1_counts_too(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert quota_cores(tmp_path, "/") is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    assert quota_cores(tmp_path, "/") == 0.5


def test_usable_cores_are_what_affinity_and_quota_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    for quota, expected in ((None, 64), (2.5, 3), (0.25, 1), (128.0, 64)):
        monkeypatch.setattr(machine, "quota_cores", lambda quota=quota: quota)
        assert usable_cores() == expected


def test_few_open_files_are_advice_with_the_line_that_raises_them() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        (row,) = [row for row in machine_rows(0, 1 << 30) if row.name == "open files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (row.status, row.remedy) == ("advice", "ulimit -n 1024")
    assert row.figures == {"soft": 256, "hard": hard}


def test_a_disk_is_read_from_itself_and_nothing_is_left_behind(tmp_path: Path) -> None:
    found = read_speed(tmp_path, 16 << 20)
    assert found is not None
    assert 0 < found.num_bytes <= 16 << 20
    assert found.elapsed_s > 0
    assert list(tmp_path.iterdir()) == []
    row = disk_row(tmp_path)
    assert "MB/s" in row.value
    assert row.figures["read_bytes_per_s"] > 0


def test_what_lies_in_memory_is_said_to() -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no shared memory to write to")
    found = read_speed(Path("/dev/shm"), 8 << 20)
    assert found is not None
    assert found.cached_share == 1.0
    assert "100% of it from the page cache: the disk itself may be slower" in disk_row(Path("/dev/shm")).value


def test_a_full_disk_and_one_that_refuses_are_rows(tmp_path: Path) -> None:
    assert read_speed(tmp_path, 1 << 20) is None
    row = disk_row(Path("/proc"))  # no room, and nobody may write
    assert row.status == "advice"
    assert row.remedy
