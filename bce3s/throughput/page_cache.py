"""The kernel's page cache: which part of a file it holds, and asking it to let go."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.format.reader import map_file

_LIBC = ctypes.CDLL(None, use_errno=True)


def resident_share(paths: Sequence[Path]) -> float:
    """Share of the files' pages that lie in the page cache, 0…1, by mincore(2).

    Raises:
        OSError: a file cannot be opened, or belongs to someone else: the kernel then calls every page resident.
    """
    resident = pages = 0
    for path in paths:
        if path.stat().st_uid != os.geteuid() and not os.access(path, os.W_OK):
            raise OSError(f"only the owner of {path} is told whether its pages are in the page cache")
        mapped = map_file(path.parent, path.name)
        held = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        arguments = (ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(held.ctypes.data))
        if _LIBC.mincore(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
        resident += int((held & 1).sum())
        pages += len(held)
    return resident / max(1, pages)


def drop(paths: Sequence[Path]) -> None:
    """Asks the kernel to drop the files' pages; pages that a process has mapped and touched stay."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages not yet written are never dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def total_memory_bytes() -> int:
    """Memory of the machine, which is as much page cache as there can be; 0 where it is not told."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("MemTotal:")]
    return int(found[0]) << 10 if found else 0
