"""Shard folders for the tests of this folder and of the tools: with everything a manifest can name, damaged, and forged."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.conversion import ExecutorOptions, Resampling, WriteOptions, write_shards
from pipelines.format import open_shards
from pipelines.format.verify import verify_shards
from pipelines.types import SPLITS, EncodedSample, OpenDataset, ShardError, Split
from tests.pipelines.format.images import image_bytes, smooth

CLASS_NAMES = ("ant", "bee", "cat")
COUNTS = {"train": [9, 6, 3], "val": [0, 0, 0], "test": [2, 2, 2]}
UNREADABLE = 4  # position of a training image that does not decode and is left out: all keys from there on are one above the sample id


def open_small_dataset() -> OpenDataset:
    """JPEG and PNG images of several sizes in turn; one training image does not decode."""

    def split(name: str) -> Split:
        counts = np.array(COUNTS[name]) + (np.arange(3) == 1) * (name == "train")
        labels_N = np.random.default_rng(0).permutation(np.repeat(np.arange(3), counts)).astype(np.int64)
        if name == "train":
            swapped = int(np.flatnonzero(labels_N == 1)[0])
            labels_N[[UNREADABLE, swapped]] = labels_N[[swapped, UNREADABLE]]

        def read(i: int) -> EncodedSample:
            kind = ("JPEG", "PNG")[i % 2]
            encoded = image_bytes(kind, pixels=np.roll(smooth(30 + i, 44), 3 * i, axis=1))
            if name == "train" and i == UNREADABLE:
                encoded = b"no image"
            return EncodedSample(encoded=encoded, extension=kind.lower(), label=int(labels_N[i]), source=f"{name}/{i}")

        return Split(labels_N=labels_N, sources=[f"{name}/{i}" for i in range(len(labels_N))], read=read)

    return OpenDataset(name="folder", class_names=CLASS_NAMES, splits={name: split(name) for name in SPLITS})


def write_folder(out: Path, *, streams: bool = True, betons: bool = False) -> Path:
    """Writes the small data set with a gap in its keys; with `streams`, also a virtual and a materialised one."""
    dataset = open_small_dataset()
    options = WriteOptions(
        shard_bytes=12 << 10,
        on_error="skip",
        formats=("wds", "ffcv") if betons else ("wds",),
        resamplings=(Resampling(sampling="class-balanced"), Resampling(sampling="square-root", materialised=True)) if streams else (),
        executor=ExecutorOptions(num_processes=1),
    )
    write_shards(dataset, {name: np.arange(len(split.labels_N)) for name, split in dataset.splits.items()}, out, options)
    return out


def read_json(root: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((root / "manifest.json").read_text())
    return manifest


def write_json(root: Path, manifest: dict[str, Any]) -> None:
    (root / "manifest.json").write_text(json.dumps(manifest))


def patch(path: Path, offset: int, content: bytes) -> None:
    """Overwrites bytes in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def forge_checksums(root: Path) -> None:
    """Makes the manifest's checksums and sizes those of the files as they are now, so that only their contents can give damage away."""

    def forge(value: Any) -> None:
        if isinstance(value, dict):
            path = root / str(value.get("file", ""))
            if path.is_file():
                value["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
                value.update({key: path.stat().st_size for key in ("shard_bytes", "beton_bytes") if key in value})
            for inner in value.values():
                forge(inner)
        elif isinstance(value, list):
            for inner in value:
                forge(inner)

    manifest = read_json(root)
    forge(manifest)
    write_json(root, manifest)


def edit_index(root: Path, field: str, ids: slice | int, value: Any, split: str = "train") -> None:
    """Sets a field of some records of an index."""
    index = np.load(root / f"{split}.index.npy")
    index[field][ids] = value
    np.save(root / f"{split}.index.npy", index)


# ---- reading, watched

_opened: list[str] | None = None  # paths, while somebody watches


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_watch)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Collects the path of every file that is opened."""
    global _opened
    _opened = paths = []
    try:
        yield paths
    finally:
        _opened = None


def read_everything(root: Path) -> None:
    """What a training run does with shards."""
    shards = open_shards(root)
    assert all(isinstance(name, str) for name in shards.class_names)
    for name in SPLITS:
        split = shards.split(name)
        assert shards.num_samples(name) == len(split) == shards.class_counts(name).sum()
        assert shards.class_counts(name).shape == (len(shards.class_names),)
        images = split.encoded(np.arange(len(split)))
        assert [len(image) for image in images] == split.sizes_N.tolist()
        assert all(image.sum() >= 0 and not image.flags.writeable for image in images)
        assert all(split.describe(sample_id).startswith(f"sample {sample_id:08d}") for sample_id in range(len(split)))


def holds_up(root: Path) -> bool:
    """Reads and verifies the folder; was it readable? Anything but a good end or one sentence fails the test."""
    refusal, problems = "", []
    with opened_files() as paths:
        try:
            read_everything(root)
        except ShardError as error:
            refusal = str(error)
        try:
            problems = [str(problem) for problem in verify_shards(root, decode=False, num_threads=1)]
        except ShardError as error:
            problems = [str(error)]
            assert refusal, "verification refuses what readers take"
    for sentence in [refusal] * bool(refusal) + problems:
        assert str(root) in sentence
        assert len(sentence.splitlines()) == 1
        assert len(sentence) < 2000
    assert problems or not refusal, "readers refuse what verification finds nothing wrong with"
    modules = (".py", ".pyc")  # imported meanwhile
    # Links that somebody put into the folder are followed; nothing that a manifest says leads out.
    inside = (os.path.realpath(root), *(os.path.realpath(path) for path in root.iterdir() if path.is_symlink()))
    assert [path for path in paths if not path.startswith(inside) and not path.endswith(modules)] == []
    return not refusal
