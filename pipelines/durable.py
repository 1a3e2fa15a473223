"""Files and folders that are whole or absent: written under a temporary name, fsynced, renamed."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
_SYNC_FILE_RANGE_WRITE = 2


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes `path`'s place when the block ends well; otherwise what was there before still stands."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`, or leaves it as it was."""
    with replacing(path) as file:
        file.write(content)


def begin_writeback(file: BinaryIO, start: int, stop: int) -> None:
    """Has the disk begin with bytes start … stop−1 of `file` without waiting for it, so that the fsync at the end finds little left.

    Linux only, where the kernel would else let them lie for half a minute; elsewhere nothing happens. Errors show at the fsync.
    """
    if _SYNC_FILE_RANGE is not None:
        file.flush()
        _SYNC_FILE_RANGE(file.fileno(), ctypes.c_int64(start), ctypes.c_int64(stop - start), _SYNC_FILE_RANGE_WRITE)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(finished: Path, out: Path) -> None:
    """Moves the folder `finished` to `out` beside it; what stood there goes only once the new one is in place."""
    sync_folder(finished)
    retired = out.with_name(f".{out.name}.bce3s-retired")  # nobody else's name: what bears it is removed
    shutil.rmtree(retired, ignore_errors=True)
    if out.exists():
        out.rename(retired)
    finished.rename(out)
    shutil.rmtree(retired, ignore_errors=True)
    sync_folder(out.parent)
