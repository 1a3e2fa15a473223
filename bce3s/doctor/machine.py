"""Rows of the machine: the cores and the memory this process may use, limits, shared memory."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path

from bce3s.doctor.rows import ADVICE, OK, Row

_GIB = 1 << 30
_MIN_FREE_BYTES = 2 * _GIB
_MIN_FILES = 1024
_MIN_SHARED_BYTES = 1 << 30
_GROUPS = Path("/sys/fs/cgroup")


def machine_rows(num_gpus: int, free_bytes: int | None) -> list[Row]:
    """Cores, memory, limit of open files, shared memory.

    Args:
        num_gpus: that torch can use.
        free_bytes: memory that can be had, control groups considered; None where the probe that counts it failed.
    """
    return [_cores_row(), _memory_row(free_bytes), _files_row(), _shared_row(num_gpus)]


def usable_cores() -> int:
    """Cores this process may keep busy: by affinity, and by the quota of its control group, rounded up."""
    quota = quota_cores()
    allowed = len(os.sched_getaffinity(0))
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def quota_cores(groups: Path = _GROUPS, own: str | None = None) -> float | None:
    """Cores' worth of time that the control groups allow, the least of this one and those above it; None where none sets a limit.

    Args:
        groups: where control groups are mounted.
        own: path of this process's group of version 2, such as "/user.slice"; by default what the kernel says.
    """
    found: list[float] = []
    path = _own_group() if own is None else own
    inner = groups / path.lstrip("/")
    for folder in {groups, inner, *(parent for parent in inner.parents if parent.is_relative_to(groups))}:
        quota, period = _numbers(folder / "cpu.max")
        if quota is not None and period:
            found.append(quota / period)
    # Version 1, where containers of older hosts still live.
    quota, _ = _numbers(groups / "cpu" / "cpu.cfs_quota_us")
    period, _ = _numbers(groups / "cpu" / "cpu.cfs_period_us")
    if quota is not None and quota > 0 and period:
        found.append(quota / period)
    return min(found, default=None)


def _own_group() -> str:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return "/"
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


def _numbers(path: Path) -> tuple[float | None, float | None]:
    """The first two words of a file as numbers; None for what is "max", missing or no number."""
    try:
        words = path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        words = []
    found = [float(word) if word.lstrip("-").isdigit() else None for word in [*words, "", ""][:2]]
    return found[0], found[1]


def _cores_row() -> Row:
    total, allowed, quota = os.cpu_count() or 1, len(os.sched_getaffinity(0)), quota_cores()
    parts = [f"{usable_cores()} usable"]
    if allowed < total:
        parts.append(f"affinity allows {allowed} of {total}")
    if quota is not None and quota < allowed:
        parts.append(f"the control group allows {quota:g} cores' worth of time, of {allowed}")
    figures = {"total": total, "affinity": allowed, "quota": quota, "usable": usable_cores()}
    return Row(section="machine", name="CPU cores", status=OK, value="; ".join(parts), figures=figures)


def _memory_row(free_bytes: int | None) -> Row:
    known = _meminfo()
    free = known.get("MemAvailable", 0) if free_bytes is None else free_bytes
    short = free < _MIN_FREE_BYTES
    return Row(
        section="machine",
        name="memory",
        status=ADVICE if short else OK,
        value=f"{free / _GIB:.1f} GiB can be had of {known.get('MemTotal', 0) / _GIB:.1f} GiB",
        remedy="close other programs, or give the container more memory" if short else "",
        figures={"free_bytes": free, "total_bytes": known.get("MemTotal", 0)},
    )


def _meminfo() -> dict[str, int]:
    """Bytes by name, as the kernel counts them for the whole machine."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith("kB")}


def _files_row() -> Row:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < _MIN_FILES
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    allowed = _MIN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MIN_FILES)
    remedy = f"ulimit -n {allowed}" if few and allowed > soft else "ask for a higher hard limit (ulimit -Hn)" if few else ""
    value = f"{'unlimited' if soft == resource.RLIM_INFINITY else soft}, at most {most}"
    return Row(
        section="machine", name="open files", status=ADVICE if few else OK, value=value, remedy=remedy, figures={"soft": soft, "hard": hard}
    )


def _shared_row(num_gpus: int) -> Row:
    """NCCL moves gradients between the GPUs of one machine through it."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return Row(section="machine", name="/dev/shm", status=ADVICE if num_gpus > 1 else OK, value="there is none")
    num_bytes, free = status.f_frsize * status.f_blocks, status.f_frsize * status.f_bavail
    short = num_gpus > 1 and num_bytes < _MIN_SHARED_BYTES
    return Row(
        section="machine",
        name="/dev/shm",
        status=ADVICE if short else OK,
        value=f"{free / _GIB:.1f} GiB free of {num_bytes / _GIB:.1f} GiB",
        remedy="start the container with --shm-size=8g" if short else "",
        figures={"bytes": num_bytes, "free_bytes": free},
    )
