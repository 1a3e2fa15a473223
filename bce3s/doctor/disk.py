"""How fast a folder's disk reads one after another, from a file written for it, which nobody else ever sees."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bce3s.doctor.rows import ADVICE, OK, Row

_MAX_BYTES, _PIECE_BYTES = 256 << 20, 8 << 20
_WRITE_S, _READ_S = 0.6, 1.0
_SPARE = 0.1  # at most this share of what is free is written
_IN_MEMORY = 0.02  # of the pages, from which the page cache had a part in it
_MIN_FREE_BYTES = 5 << 30
_GIB = 1 << 30


@dataclass(frozen=True)
class ReadSpeed:
    """Bytes read, seconds it took, and the share of them that lay in the page cache before (None: nobody could be asked)."""

    num_bytes: int
    elapsed_s: float
    cached_share: float | None


def disk_row(folder: Path) -> Row:
    """Free bytes and speed; a folder that cannot be written to is a finding too."""
    status = os.statvfs(folder)
    free = status.f_frsize * status.f_bavail
    parts, figures = [f"{folder}: {free / _GIB:.1f} GiB free"], {"path": str(folder), "free_bytes": free, "read_bytes_per_s": None}
    remedy = "make room, or keep shards and runs on another disk" if free < _MIN_FREE_BYTES else ""
    try:
        speed = read_speed(folder, min(_MAX_BYTES, int(_SPARE * free)))
    except OSError as error:
        parts.append(f"cannot be written to ({error.strerror or error})")
        remedy = remedy or "name a folder of yours with --path"
    else:
        if speed is not None:
            rate = speed.num_bytes / speed.elapsed_s
            figures |= {"read_bytes_per_s": rate, "cached_share": speed.cached_share, "measured_bytes": speed.num_bytes}
            parts.append(f"reads {rate / 1e6:,.0f} MB/s ({speed.num_bytes >> 20} MiB, just written{_doubt(speed)})")
        else:
            parts.append("too full to measure how fast it reads")
    return Row(section="machine", name="disk", status=ADVICE if remedy else OK, value="; ".join(parts), remedy=remedy, figures=figures)


def _doubt(speed: ReadSpeed) -> str:
    if speed.cached_share is None:
        return ", perhaps from the page cache"
    if speed.cached_share > _IN_MEMORY:
        return f", {speed.cached_share:.0%} of it from the page cache: the disk itself may be slower"
    return ", not from the page cache"


def read_speed(folder: Path, max_bytes: int) -> ReadSpeed | None:
    """Writes for about half a second, drops the pages, reads for a second at most; None where there is no room for 8 MiB.

    The file has lost its name before its first byte, so that whatever happens nothing is left behind.

    Raises:
        OSError: the folder cannot be written to.
    """
    if max_bytes < _PIECE_BYTES:
        return None
    descriptor, name = tempfile.mkstemp(prefix=".bce3s-doctor-", dir=folder)
    try:
        os.unlink(name)
        num_bytes = _write(descriptor, max_bytes)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        cached_share = _cached_share(descriptor)
        buffer, read, started_s = bytearray(_PIECE_BYTES), 0, time.perf_counter()
        elapsed_s = 0.0
        while read < num_bytes and elapsed_s < _READ_S:
            read += os.preadv(descriptor, [buffer], read)
            elapsed_s = time.perf_counter() - started_s
        return ReadSpeed(read, max(elapsed_s, 1e-9), cached_share)
    finally:
        os.close(descriptor)


def _write(descriptor: int, max_bytes: int) -> int:
    """Bytes written and on the disk; random ones, because some file systems store zeros, and what repeats, as nothing."""
    written, started_s = 0, time.perf_counter()
    while written + _PIECE_BYTES <= max_bytes and time.perf_counter() - started_s < _WRITE_S:
        piece = os.urandom(_PIECE_BYTES)
        written += os.pwrite(descriptor, piece, written)
        os.fdatasync(descriptor)  # each piece: one sync at the end could take a minute on a slow disk
    return written


def _cached_share(descriptor: int) -> float | None:
    try:
        from bce3s.throughput.page_cache import resident_share

        return resident_share([Path(f"/proc/self/fd/{descriptor}")])
    except (ImportError, OSError):  # a broken package has a row of its own
        return None
