"""Writes one shard: `{key:08d}.jpg|png` then `{key:08d}.cls`, with headers that depend on names and sizes only."""

from __future__ import annotations

import hashlib
import tarfile
from typing import BinaryIO

from pipelines.durable import begin_writeback
from pipelines.types import EncodedSample

TAR_BLOCK = tarfile.BLOCKSIZE
_MODE = 0o444
_WRITEBACK_BYTES = 8 << 20
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)  # POSIX ustar, fields of a header
_BLANK_SUM_BYTE = 32  # the checksum is taken with its own eight bytes as spaces


def _template() -> bytes:
    header = tarfile.TarInfo("")
    header.mode = _MODE
    return header.tobuf(tarfile.USTAR_FORMAT)


# `TarInfo.tobuf` takes 15 µs a header, this 3, and a sample has two; three of their fields differ from sample to sample.
_TEMPLATE = _template()


def member_header(name: str, size: int) -> bytes:
    """The 512-byte ustar header of a regular file: mode 0444, no owner, no date; `name` in ASCII, at most 99 bytes."""
    header = bytearray(_TEMPLATE)
    header[_NAME] = name.encode("ascii").ljust(100, b"\0")
    header[_SIZE] = b"%011o\0" % size
    header[_CHECKSUM] = b" " * 8
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header)


def tar_bytes(encoded_bytes: int) -> int:
    """What a sample takes in a tar: two headers, the image in whole blocks, the label in one."""
    return encoded_bytes + -encoded_bytes % TAR_BLOCK + 3 * TAR_BLOCK


class TarWriter:
    """Appends samples to a tar and hashes what it writes.

    Attributes:
        num_bytes: written so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        """`file` is open for writing and stays the caller's to close."""
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self._begun = 0  # bytes that the disk was told to take

    def add(self, key: int, sample: EncodedSample) -> int:
        """Appends one sample; returns the offset of its image bytes in the tar."""
        label = str(sample.label).encode()
        size = len(sample.encoded)
        self._write(member_header(f"{key:08d}.{sample.extension}", size))
        offset = self.num_bytes
        self._write(sample.encoded)
        self._write(bytes(-size % TAR_BLOCK) + member_header(f"{key:08d}.cls", len(label)) + label.ljust(TAR_BLOCK, b"\0"))
        return offset

    def finish(self) -> str:
        """Ends the archive as tar does, in records of 10 KiB; returns its SHA-256, hex."""
        end = self.num_bytes + 2 * TAR_BLOCK
        self._write(bytes(end + -end % tarfile.RECORDSIZE - self.num_bytes))
        return self._digest.hexdigest()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.num_bytes += len(content)
        if self.num_bytes - self._begun >= _WRITEBACK_BYTES:
            begin_writeback(self._file, self._begun, self.num_bytes)
            self._begun = self.num_bytes
