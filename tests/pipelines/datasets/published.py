"""Small sources in the layouts of the published data sets: the same pictures as trees, tars, and tars of tars."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from PIL import Image

from pipelines.types import SPLITS, DatasetError, EncodedSample, OpenDataset

Item = TypeVar("Item")
Samples = list[tuple[str, int, bytes]]


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (number % 256, number // 256, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    header = tarfile.TarInfo(name)
    header.type, header.size, header.linkname = kind, len(content), link
    return header, content


def write_tar(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
        for header, content in members:
            tar.addfile(header, io.BytesIO(content))
    return path


def write_files_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    return write_tar(path, [member(name, content) for name, content in files.items()], mode)


def write_list(path: Path, entries: Iterable[tuple[str, int]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name} {label}\n" for name, label in entries), encoding="utf-8")
    return path


def samples(dataset: OpenDataset, split: str) -> Samples:
    """(source's last part, label, bytes) of every sample of a split, read at random places."""
    found = [dataset.splits[split].read(index) for index in range(len(dataset.splits[split].labels_N))]
    assert [sample.source for sample in found] == list(dataset.splits[split].sources)
    return [_seen(sample) for sample in found]


def streamed(dataset: OpenDataset) -> dict[str, Samples]:
    """The same out of the stream, put in order."""
    assert dataset.stream is not None
    found: dict[str, dict[int, EncodedSample]] = {split: {} for split in SPLITS}
    for split, index, sample in dataset.stream():
        assert index not in found[split]
        assert (sample.source, sample.label) == (dataset.splits[split].sources[index], dataset.splits[split].labels_N[index])
        found[split][index] = sample
    return {split: [_seen(rows[index]) for index in sorted(rows)] for split, rows in found.items()}


def until_error(stream: Iterable[Item]) -> tuple[list[Item], str]:
    """What came before the error that a user sees, and its sentence."""
    came: list[Item] = []
    try:
        for item in stream:
            came.append(item)
    except DatasetError as error:
        return came, str(error)
    raise AssertionError("the stream ended well")


def _seen(sample: EncodedSample) -> tuple[str, int, bytes]:
    assert sample.extension in ("jpg", "png")
    return sample.source.rsplit("/", 1)[-1].rsplit("!", 1)[-1].split(" (at byte")[0], sample.label, sample.encoded
