"""Reads one shard from front to back and says what is wrong with it; of its headers and bytes nothing is taken on trust."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.format.encoding import MAX_SIDE, prepare_sample
from pipelines.format.index import INDEX_DTYPE, open_inside
from pipelines.format.jpeg_header import read_jpeg_header
from pipelines.format.tar import TAR_BLOCK
from pipelines.types import DatasetError, EncodedSample

_MAX_MEMBER_BYTES = (1 << 32) - 1  # what the index can hold
_PNG_MAGIC = b"\x89PNG"
_MEMBER = re.compile(r"([0-9]{8,})\.(jpg|png|cls)")
_LABEL = re.compile(rb"[0-9]{1,9}")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a shard folder.

    Args:
        path: the file.
        sample_id: of the sample concerned, None where it is the whole file.
        sentence: what is wrong, as a predicate of the two.
        warning: True where the data can be used all the same.
    """

    path: Path
    sample_id: int | None
    sentence: str
    warning: bool = False

    def __str__(self) -> str:
        sample = "" if self.sample_id is None else f"sample {self.sample_id:08d} of "
        text = f"{sample}{self.path} {self.sentence}"
        # Names of files and tar members may hold line ends and what no terminal shows.
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@dataclass
class ShardFindings:
    """What a tar holds, INDEX_DTYPE [N] with `shard` 0 (up to the first damaged header), and what is wrong with it."""

    problems: list[Problem] = field(default_factory=list)
    records_N: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, INDEX_DTYPE))


class _Sample(NamedTuple):
    key: int
    extension: str
    offset: int
    encoded: bytes
    label: bytes


class _Unreadable(Exception):
    """The tar cannot be followed any further; the message is a predicate of it."""


class _Tar:
    """Reads a tar once, in order, and hashes all of it."""

    def __init__(self, file: BinaryIO, num_bytes: int, on_bytes: Callable[[int], None]) -> None:
        self._file, self._num_bytes, self._on_bytes = file, num_bytes, on_bytes
        self.digest = hashlib.sha256()
        self.position = 0

    def read(self, num_bytes: int) -> bytes:
        content = self._file.read(num_bytes)
        self.digest.update(content)
        self.position += len(content)
        self._on_bytes(len(content))
        return content

    def members(self) -> Iterator[tuple[str, int, bytes]]:
        """Yields name, offset and content of each member up to the end mark."""
        while True:
            start, header = self.position, self.read(TAR_BLOCK)
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                return
            except tarfile.HeaderError as error:
                raise _Unreadable(f"is damaged at byte {start}: no tar header ({error}); what follows was not read") from None
            if not info.isreg() or not 0 <= info.size <= _MAX_MEMBER_BYTES:
                raise _Unreadable(f"has at byte {start} a member '{info.name}' that is no image; what follows was not read")
            if self.position + info.size > self._num_bytes:
                raise _Unreadable(f"ends within the member '{info.name}'")
            offset, content = self.position, self.read(info.size)
            self.read(-info.size % TAR_BLOCK)
            yield info.name, offset, content

    def samples(self) -> Iterator[_Sample]:
        """Yields each image with the label behind it."""
        image: tuple[int, str, int, bytes] | None = None
        for name, offset, content in self.members():
            match = _MEMBER.fullmatch(name)
            if match is None or (match[2] == "cls") != (image is not None) or (image and image[0] != int(match[1])):
                wanted = "an image" if image is None else f"the label of {image[0]:08d}"
                raise _Unreadable(f"has a member '{name}' where {wanted} should be; what follows was not read")
            if image is None:
                image = int(match[1]), match[2], offset, content
            else:
                yield _Sample(*image, content)
                image = None
        if image:
            raise _Unreadable(f"ends before the label of {image[0]:08d}")


def examine_shard(
    root: Path,
    shard: dict[str, Any],
    *,
    first_id: int,
    num_classes: int,
    expected_N: NDArray[np.void] | None = None,
    decode: bool = True,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> ShardFindings:
    """Checks one tar against its manifest entry and, where given, its part of the index.

    Args:
        root: the shard folder.
        shard: the tar's manifest entry; with `num_samples` None any number will do.
        first_id: sample id of its first image.
        num_classes: K.
        expected_N: INDEX_DTYPE, its records in the index; None checks the tar alone.
        decode: decode every image in full, not only its header.
        on_bytes: called with the bytes read, often.

    Returns:
        What was found. Everything wrong is a `Problem`; nothing is raised.
    """
    path = root / shard["file"]
    findings = ShardFindings()
    records: list[tuple[int, int, int, int, int, int]] = []
    complete, last_key = True, -1

    def report(sentence: str, sample_id: int | None = None, warning: bool = False) -> None:
        findings.problems.append(Problem(path, sample_id, sentence, warning))

    try:
        with open_inside(root, shard["file"]) as file:
            num_bytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            tar = _Tar(file, num_bytes, on_bytes)
            try:
                for sample in tar.samples():
                    sample_id = first_id + len(records)
                    record, faults = _examine_sample(sample, num_classes, decode)
                    if expected_N is not None and len(records) < len(expected_N):
                        faults += [(fault, False) for fault in _differences(record, expected_N[len(records)])]
                    if sample.key <= last_key:
                        faults.append((f"is named {sample.key:08d}, which does not come after {last_key:08d}", False))
                    for sentence, warning in faults:
                        report(sentence, sample_id, warning)
                    records.append(record)
                    last_key = sample.key
            except _Unreadable as error:
                complete = False
                report(str(error), first_id + len(records))
            while tar.read(1 << 20):
                pass
    except OSError as error:
        report(f"cannot be read: {error.strerror or error}; copy it again or make the shards again")
        return findings
    findings.records_N = np.array(records, INDEX_DTYPE)
    if num_bytes != shard["shard_bytes"]:
        report(f"has {num_bytes} bytes, the manifest says {shard['shard_bytes']}; copy it again")
    elif tar.digest.hexdigest() != shard["sha256"]:
        report("has not the checksum that the manifest says: it is damaged; copy it again or make the shards again")
    if complete and shard["num_samples"] not in (None, len(records)):
        report(f"holds {len(records)} samples, the manifest says {shard['num_samples']}")
    if complete and expected_N is not None and len(records) != len(expected_N):
        report(f"holds {len(records)} samples, the index lists {len(expected_N)}")
    return findings


def _examine_sample(sample: _Sample, num_classes: int, decode: bool) -> tuple[tuple[int, int, int, int, int, int], list[tuple[str, bool]]]:
    """The sample's index record, and what is wrong with it: (sentence, only a warning?)."""
    faults: list[tuple[str, bool]] = []
    label = int(sample.label) if _LABEL.fullmatch(sample.label) else -1
    if not 0 <= label < num_classes:
        faults.append((f"has the label {sample.label[:20]!r}, which is no class of 0…{num_classes - 1}", False))
    height = width = 0
    try:
        if decode:
            prepared = prepare_sample(EncodedSample(encoded=sample.encoded, extension=sample.extension, label=label, source=""))
            height, width = prepared.height, prepared.width
            if prepared.reencoded:
                faults.append(("is no plain JPEG or PNG, or a damaged one: decoders may differ on it", True))
        else:
            height, width = _image_size(sample.encoded)
    except DatasetError as error:
        faults.append((str(error).strip(), False))
    is_png = sample.encoded.startswith(_PNG_MAGIC)
    if height and is_png != (sample.extension == "png"):
        faults.append((f"is named .{sample.extension}, which its bytes are not", False))
    return (0, len(sample.encoded), sample.offset, label, height, width), faults


def _image_size(encoded: bytes) -> tuple[int, int]:
    """Height and width from the header.

    Raises:
        DatasetError: there is none; the message is a predicate of the image.
    """
    header = read_jpeg_header(encoded)
    if header is not None:
        return header.height, header.width
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if max(image.size) > MAX_SIDE:
                raise ValueError(f"{image.width}×{image.height} pixels are too many")
            return image.height, image.width
    except Exception as error:  # Pillow's readers raise OSError, ValueError, SyntaxError, struct.error and more
        raise DatasetError("is not a readable image: unknown or damaged format") from error


def _differences(found: tuple[int, int, int, int, int, int], expected: np.void) -> Iterator[str]:
    _, size, offset, label, height, width = found
    if (offset, size) != (expected["offset"], expected["size"]):
        yield f"has {size} bytes at {offset}, the index says {expected['size']} at {expected['offset']}"
    if label != expected["label"]:
        yield f"has the label {label} in the tar, {expected['label']} in the index"
    # 0 where the image could not be read, which is reported already.
    if height and (height, width) != (expected["height"], expected["width"]):
        yield f"has {height}×{width} pixels (height×width), the index says {expected['height']}×{expected['width']}"
