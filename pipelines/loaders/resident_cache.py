"""Decoded images kept on disk for the next run: a header of 4096 bytes that says what they are, then the buffer of `resident`, mapped.

A file bears its name only once it is whole and on the disk. Until then it is a draft of its own process, which the next process to fill
the folder removes if its owner was killed. One process fills at a time; others wait and then map what it wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from pipelines.durable import begin_writeback, sync_folder
from pipelines.format.reader import ByteArray
from pipelines.loaders.planned import PixelRequest

VERSION = 1
HEADER_BYTES = 4096
AUTO_MIN_BYTES = 1 << 30
_SUFFIX, _DRAFT_SUFFIX = ".resident", ".partial"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheFile:
    """Where one decoded split is kept, and the header that a file must have to be it."""

    path: Path
    header: bytes
    num_bytes: int


def cache_file(request: PixelRequest, side: int, num_bytes: int) -> CacheFile | None:
    """The file for a split at shorter side `side`; None where `config.resident.cache` wants none."""
    place = request.config.resident.cache
    if place == "off" or (place == "auto" and num_bytes < AUTO_MIN_BYTES):
        return None
    root = Path(request.shards.root).resolve()
    folder = root.with_name(root.name + _SUFFIX) if place == "auto" else Path(place)
    identity = {
        "format": "bce3s-resident",
        "version": VERSION,
        "shards": request.shards.fingerprint,
        "split": request.split.name,
        "side": side,
        "decoder": f"dali {_dali_version()} {request.device.type}",
        "num_bytes": num_bytes,
    }
    text = json.dumps(identity, sort_keys=True).encode()
    name = f"{request.split.name}-{side}-{hashlib.sha256(text).hexdigest()[:16]}{_SUFFIX}"
    return CacheFile(folder / name, text.ljust(HEADER_BYTES), num_bytes)


def _dali_version() -> str:
    for package in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
    return "unknown"


def open_cached(cache: CacheFile) -> ByteArray | None:
    """The buffer, read-only, uint8 [num_bytes]; None where no whole file of this identity can be read."""
    try:
        with cache.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != HEADER_BYTES + cache.num_bytes or file.read(HEADER_BYTES) != cache.header:
                return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:
        return None
    return np.frombuffer(mapped, np.uint8, offset=HEADER_BYTES)


class CacheDraft:
    """A file in the making, mapped so that it is filled where it will be read from.

    Attributes:
        path: the file, while it is a draft.
        pixels_P: uint8 [num_bytes], writable; stays valid whatever becomes of the file.
    """

    def __init__(self, cache: CacheFile) -> None:
        """Takes all its room on the disk at once, so that a full one shows now.

        Raises:
            OSError: the file cannot be made.
        """
        self._cache = cache
        self.path = cache.path.with_name(f"{cache.path.name}.{os.getpid()}-{secrets.token_hex(4)}{_DRAFT_SUFFIX}")
        self._file = self.path.open("x+b")
        try:
            os.posix_fallocate(self._file.fileno(), 0, HEADER_BYTES + cache.num_bytes)
            self._map = mmap.mmap(self._file.fileno(), HEADER_BYTES + cache.num_bytes)
        except OSError:
            self.discard()
            raise
        self.pixels_P: ByteArray = np.frombuffer(self._map, np.uint8, offset=HEADER_BYTES)

    def begin_writeback(self, start: int, stop: int) -> None:
        """Has the disk begin with bytes start … stop−1 of the buffer."""
        begin_writeback(self._file, HEADER_BYTES + start, HEADER_BYTES + stop)

    def publish(self) -> None:
        """Gives the file its name once everything is on the disk; a disk that fails costs a line in the log and the file."""
        try:
            self._map[:HEADER_BYTES] = self._cache.header
            self._map.flush()
            os.fsync(self._file.fileno())
            self.path.replace(self._cache.path)
            sync_folder(self._cache.path.parent)
        except OSError as error:
            _report(self._cache, error)
        self.discard()

    def discard(self) -> None:
        """Removes the draft if it is still one; the buffer can still be read."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def begin_draft(cache: CacheFile) -> CacheDraft | None:
    """A draft of `cache`; None, and a line in the log, where the disk does not take it."""
    try:
        return CacheDraft(cache)
    except OSError as error:
        _report(cache, error)
        return None


def _report(cache: CacheFile, error: OSError) -> None:
    _LOG.warning(
        "decoded images are not kept for the next run: %s cannot be written (%s); give room or set data.resident.cache to another folder",
        cache.path,
        error.strerror or error,
    )


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keeps other processes from filling `folder` meanwhile, which it makes; drafts of processes that were killed go.

    Where the file system has no locks, or the folder cannot be made, everybody fills for themselves.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _LOG.info("another process decodes into %s; waiting for it", folder)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            for draft in folder.glob(f"*{_SUFFIX}.*{_DRAFT_SUFFIX}"):
                draft.unlink(missing_ok=True)
        yield
