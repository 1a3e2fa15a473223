"""Images inside tar archives, read where they lie: an index of offsets for plain tars, one pass from front to back for compressed ones.

`tarfile` reads the headers. It would keep a record of every member, which at 1.3 million is more than the index, so that list is emptied
on the way. Of a member that is there twice, the first counts.
"""

from __future__ import annotations

import gzip
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np

from pipelines.datasets.files import image_extension, printable
from pipelines.types import DatasetError, EncodedSample, IntArray, Split

_GZIP_MAGIC = b"\x1f\x8b"
# What damaged bytes make `tarfile` and `gzip` raise.
_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class TarMembers:
    """Where images lie in a tar.

    Args:
        archive: an uncompressed tar.
        names: N member names; of a member of a class tar inside, "<class tar without .tar>/<member>".
        offsets_N: int64 [N], of the first byte of each image; -1 where the archive does not hold it.
        sizes_N: int64 [N], in bytes.
    """

    archive: Path
    names: Sequence[str]
    offsets_N: IntArray
    sizes_N: IntArray

    def split(self, rows_N: IntArray, labels_N: IntArray) -> Split:
        """The split of the members `rows_N`, int64 [N], labelled `labels_N`, int64 [N]; `read` is safe in threads and forked processes."""
        names = [self.names[row] for row in rows_N.tolist()]
        offsets_N, sizes_N, archive = self.offsets_N[rows_N], self.sizes_N[rows_N], self.archive
        sources = MemberSources(archive, names, offsets_N)

        def read(position: int) -> EncodedSample:
            encoded = _read_at(archive, int(offsets_N[position]), int(sizes_N[position]), sources[position])
            extension = image_extension(names[position])
            return EncodedSample(encoded=encoded, extension=extension, label=int(labels_N[position]), source=sources[position])

        return Split(labels_N=labels_N.astype(np.int64), sources=sources, read=read)


class MemberSources(Sequence[str]):
    """N names for messages, "archive!member (at byte 1536)", put together when asked for: half a million whole ones are 80 MB.

    Args:
        archive: the tar.
        names: N member names.
        offsets_N: int64 [N], of the image in the archive; None where it is compressed and has no such place.
    """

    def __init__(self, archive: Path, names: Sequence[str], offsets_N: IntArray | None = None) -> None:
        """Keeps what it is given."""
        self._archive, self._names, self._offsets_N = archive, names, offsets_N

    def __len__(self) -> int:
        """N."""
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> MemberSources: ...
    def __getitem__(self, index: int | slice) -> str | MemberSources:
        """The name at `index`, or the names of a slice."""
        if isinstance(index, slice):
            return MemberSources(self._archive, self._names[index], None if self._offsets_N is None else self._offsets_N[index])
        place = "" if self._offsets_N is None else f" (at byte {self._offsets_N[index]})"
        return printable(f"{self._archive}!{self._names[index]}") + place


def is_gzip(archive: Path) -> bool:
    """Whether a file is compressed, by its first bytes; `DatasetError` where it cannot be read."""
    try:
        with archive.open("rb") as file:
            return file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    except OSError as error:
        raise DatasetError(f"cannot read {archive} ({error.strerror}): make it readable and run the command again") from error


def index_tar(archive: Path, wanted: Sequence[str]) -> TarMembers:
    """Finds members of an uncompressed tar, also those of tars inside it, by reading its headers once.

    Args:
        archive: the tar.
        wanted: N different member names, without leading "./"; other members are passed over.

    Raises:
        DatasetError: the archive cannot be read, is cut short or damaged, or a wanted member is a link, a device, or leaves the archive.
    """
    row_of = {name: row for row, name in enumerate(wanted)}
    class_names = {name.partition("/")[0] for name in wanted}
    offsets_N, sizes_N = np.full(len(wanted), -1, np.int64), np.zeros(len(wanted), np.int64)
    position = archive_bytes = 0

    def note(member: tarfile.TarInfo, prefix: str) -> None:
        key = _key(prefix + member.name)
        row = row_of.get(key)
        if row is not None and offsets_N[row] < 0:
            _require_plain(archive, member)
            offsets_N[row], sizes_N[row] = member.offset_data, member.size

    try:
        with archive.open("rb") as file:
            archive_bytes = os.fstat(file.fileno()).st_size
            for member in _members(file, 0, archive_bytes):
                position = member.offset
                class_name, suffix = posixpath.splitext(_key(member.name))
                if suffix == ".tar" and class_name in class_names:
                    _require_plain(archive, member)
                    for inner in _members(file, member.offset_data, member.offset_data + member.size):
                        position = inner.offset
                        note(inner, f"{class_name}/")
                else:
                    note(member, "")
    except DatasetError:
        raise
    except _DAMAGE as error:
        raise _damaged(archive, f"byte {position:,} of {archive_bytes:,}", error) from error
    return TarMembers(archive=archive, names=wanted, offsets_N=offsets_N, sizes_N=sizes_N)


def stream_tar(archive: Path, wanted: Sequence[str]) -> Iterator[tuple[int, bytes]]:
    """Reads a gzip-compressed tar from front to back.

    Args:
        archive: the `.tar.gz`.
        wanted: N different member names, without leading "./".

    Yields:
        (position in `wanted`, bytes) in the archive's own order, each position once.

    Raises:
        DatasetError: as `index_tar` does, or at the end where wanted members did not come.
    """
    row_of = {name: row for row, name in enumerate(wanted)}
    num_found, num_members = 0, 0
    try:
        with gzip.open(archive, "rb") as file, _open_tar(file, "r|") as tar:  # type: ignore[arg-type]
            while (member := _next(tar)) is not None:
                num_members += 1
                row = row_of.pop(_key(member.name), None)
                if row is None:
                    continue
                _require_plain(archive, member)
                content = tar.extractfile(member)
                assert content is not None  # a plain file has content
                encoded = content.read()
                num_found += 1
                yield row, encoded
            # The checksum stands at the very end.
            while file.read(1 << 20):
                pass
    except DatasetError:
        raise
    except _DAMAGE as error:
        raise _damaged(archive, f"{num_found:,} of {len(wanted):,} images", error, "; the images already converted stay") from error
    if row_of:
        first = printable(next(iter(row_of)))
        raise DatasetError(
            f"{archive} ends after {num_members:,} members without {len(row_of):,} of {len(wanted):,} listed images, the first is {first}: "
            "fetch it again; the images already converted stay"
        )


def _members(file: BinaryIO, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """Headers of the tar between the bytes `start` and `end` of `file`; `tarfile.ReadError` where it does not end as it should."""
    file.seek(start)
    with _open_tar(file, "r:") as tar:
        while (member := _next(tar)) is not None:
            if member.isreg() and member.offset_data + member.size > end:
                raise tarfile.ReadError(f"{member.name!a} does not fit")
            yield member
        # `tarfile` takes a damaged header for the end, and so would a tar cut between two members pass for a whole one.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the end mark is missing")


def _open_tar(file: BinaryIO, mode: str) -> tarfile.TarFile:
    # Fixed, so that names do not depend on the locale; bytes that are not UTF-8 come through as in paths of the file system.
    return tarfile.open(fileobj=file, mode=mode, encoding="utf-8", errors="surrogateescape", bufsize=1 << 16)  # type: ignore[call-overload,no-any-return]


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    member = tar.next()
    tar.members.clear()  # type: ignore[attr-defined]
    # A forged size below zero would lead back to where we came from, for ever.
    if member is not None and (member.size < 0 or tar.offset <= member.offset):
        raise tarfile.ReadError(f"{member.name!a} has an impossible size")
    return member


def _key(name: str) -> str:
    """The name under which a member is asked for, also where its own leads astray ("/a", "b/../a")."""
    return posixpath.normpath("/" + name.replace("\\", "/")).lstrip("/")


def _require_plain(archive: Path, member: tarfile.TarInfo) -> None:
    if not member.isreg() or member.sparse is not None:
        raise DatasetError(f"{archive} holds {printable(member.name)} as a link or device, not as a file: fetch the original archive")
    if member.name.startswith("/") or "\\" in member.name or ".." in member.name.split("/"):
        raise DatasetError(f"{archive} holds '{printable(member.name)}', a name that leaves the archive: fetch the original archive")


def _read_at(archive: Path, offset: int, size: int, source: str) -> bytes:
    # Opened each time: a file kept open would be shared, or lost, where the split goes to other processes.
    try:
        descriptor = os.open(archive, os.O_RDONLY)
        try:
            encoded = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DatasetError(f"cannot read {source} ({error.strerror}): restore the archive and run the command again") from error
    if len(encoded) < size:
        raise DatasetError(f"cannot read {source} (the archive has become shorter): restore it and run the command again")
    return encoded


def _damaged(archive: Path, how_far: str, error: BaseException, comfort: str = "") -> DatasetError:
    if isinstance(error, OSError) and error.errno is not None:
        return DatasetError(f"cannot read {archive} ({error.strerror}): make it readable and run the command again")
    reason = printable(str(error)) or type(error).__name__
    return DatasetError(f"{archive} is cut short or damaged after {how_far} ({reason}): fetch it again{comfort}")
