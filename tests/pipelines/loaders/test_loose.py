"""Image files that are in no shards: the pixels that shards of them would give, whatever the files are, and however many."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import AugmentConfig, DataConfig
from pipelines.conversion import ExecutorOptions, WriteOptions, write_shards
from pipelines.datasets.files import file_split
from pipelines.format import PixelOptions, ShardSet, open_shards
from pipelines.loaders import build_loader, loose, loose_files
from pipelines.loaders.loose import LooseLoader
from pipelines.loaders.loose_files import Chunk, LooseFile, read_chunks, read_file
from pipelines.types import SPLITS, DatasetError, OpenDataset
from tests.pipelines.format.images import image_bytes, smooth, with_exif

CPU = torch.device("cpu")
CONFIG = DataConfig(loader="dali", batch_size=4, image_size=32, num_threads=2, augment=AugmentConfig(eval_crop=0.875))
PHOTO = smooth(61, 93)


def files_of(shards: ShardSet, split: str, folder: Path) -> list[str]:
    """The images of a split as files, in its order."""
    data = shards.split(split)
    paths = [folder / f"{i:05d}.jpg" for i in range(len(data))]
    for path, encoded in zip(paths, data.encoded(np.arange(len(data))), strict=True):
        path.write_bytes(encoded.tobytes())
    return [str(path) for path in paths]


def served(paths: Any, config: DataConfig = CONFIG, **options: Any) -> tuple[list[str], torch.Tensor, list[str]]:
    """Paths and images of all batches, and what was complained of."""
    complaints: list[str] = []
    with closing(LooseLoader(config, CPU, **options)) as loader:
        batches = list(loader.batches(paths, complaints.append))
    assert loader.num_damaged == len(complaints)
    images = torch.cat([images for _, images in batches]) if batches else torch.empty(0)
    return [path for paths, _ in batches for path in paths], images, complaints


def from_shards(shards: ShardSet, split: str, config: DataConfig = CONFIG) -> torch.Tensor:
    loader = build_loader(shards, split, config, seed=0, device=CPU, training=False)
    images = torch.cat([batch.images_SHWC.clone() for batch in loader.epoch(0)])
    loader.close()
    return images


@pytest.mark.parametrize("loader", ["dali", "resident", "webdataset"])
def test_files_have_the_pixels_that_evaluation_sees_to_the_bit(make_shards: Any, tmp_path: Path, loader: str) -> None:
    shards = make_shards(size=None, extension="jpg", test=9)  # 36 images of 40 to 79 px, so several chunks
    paths = files_of(shards, "test", tmp_path)
    config = replace(CONFIG, loader=loader)
    names, images, complaints = served(paths, config)
    assert names == paths
    assert not complaints
    assert torch.equal(images, from_shards(shards, "test", config))


KINDS = {
    "plain.jpg": image_bytes(pixels=PHOTO),
    "grey.jpeg": image_bytes(mode="L", pixels=PHOTO),
    "grey-alpha.png": image_bytes("PNG", "LA", PHOTO),
    "cmyk.JPG": image_bytes(mode="CMYK", pixels=PHOTO),
    "progressive.jpg": image_bytes(pixels=PHOTO, progressive=True),
    "turned.jpg": image_bytes(pixels=PHOTO, exif=with_exif(orientation=6)),
    "plain.png": image_bytes("PNG", pixels=PHOTO),
    "alpha.png": image_bytes("PNG", "RGBA", np.dstack([PHOTO, PHOTO[..., 0]])),
    "palette.gif": image_bytes("GIF", "P", PHOTO),
    "lossy.webp": image_bytes("WEBP", pixels=PHOTO),
    "raw.bmp": image_bytes("BMP", pixels=PHOTO),
    "a-png.jpg": image_bytes("PNG", pixels=PHOTO),
}


@pytest.mark.parametrize("loader", ["dali", "resident"])
def test_every_kind_of_file_is_seen_as_it_would_be_from_shards(tmp_path: Path, loader: str) -> None:
    paths = []
    for name, encoded in KINDS.items():
        (tmp_path / name).write_bytes(encoded)
        paths.append(str(tmp_path / name))
    labels_N = np.zeros(len(paths), np.int64)
    dataset = OpenDataset(name="folder", class_names=("one",), splits={split: file_split(paths, labels_N) for split in SPLITS})
    order = np.arange(len(paths))
    out = tmp_path / "shards"
    write_shards(dataset, {split: order for split in SPLITS}, out, WriteOptions(executor=ExecutorOptions(num_processes=1)))
    config = replace(CONFIG, loader=loader)
    names, images, complaints = served(paths, config)
    assert (names, complaints) == (paths, [])
    assert torch.equal(images, from_shards(open_shards(out), "test", config))
    # The turned one stands upright and the one with alpha lies on white: not what their bytes would give as they are.
    assert len({image.numpy().tobytes() for image in images}) > 8


def test_photographs_are_seen_as_from_shards(shared_data: Path, tmp_path: Path) -> None:
    paths = [str(path) for path in sorted((shared_data / "photos").iterdir())[:40]]
    labels_N, order = np.zeros(len(paths), np.int64), np.arange(len(paths))
    dataset = OpenDataset(name="folder", class_names=("one",), splits={split: file_split(paths, labels_N) for split in SPLITS})
    orders = {split: order if split == "test" else order[:1] for split in SPLITS}
    write_shards(dataset, orders, tmp_path / "shards", WriteOptions(executor=ExecutorOptions(num_processes=1)))
    config = replace(CONFIG, image_size=224, batch_size=16)
    names, images, complaints = served(paths, config)
    assert (names, complaints) == (paths, [])
    assert torch.equal(images, from_shards(open_shards(tmp_path / "shards"), "test", config))


def test_what_is_no_readable_image_is_named_and_the_others_go_on_in_order(make_shards: Any, tmp_path: Path) -> None:
    paths = files_of(make_shards(size=None, extension="jpg", test=5), "test", tmp_path)
    _, whole, _ = served(paths)
    good = Path(paths[3]).read_bytes()
    middle = len(good) // 2
    Path(paths[3]).write_bytes(good[:middle] + b"\xff" * 60 + good[middle + 60 :])
    Path(paths[7]).write_bytes(good[:middle])
    Path(paths[8]).write_bytes(b"")
    Path(paths[9]).write_text("not an image")
    Path(paths[19]).unlink()
    names, images, complaints = served(paths)
    hurt = [3, 7, 8, 9, 19]
    kept = [i for i in range(20) if i not in hurt]
    assert names == [paths[i] for i in kept]
    assert torch.equal(images, whole[kept])
    assert [complaint for i, complaint in zip(hurt, complaints, strict=True) if paths[i] not in complaint] == []
    assert complaints[-1] == f"cannot read {paths[19]} (No such file or directory)"


def test_without_validation_damage_inside_an_image_passes_unseen(tmp_path: Path) -> None:
    photo = image_bytes(pixels=smooth(120, 160))
    middle = len(photo) // 2
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(photo[:middle] + b"\xff" * 60 + photo[middle + 60 :])
    names, _, complaints = served([str(damaged)], validate=False)
    assert (names, complaints) == ([str(damaged)], [])
    assert served([str(damaged)])[2] == [f"{damaged} is not a readable image: broken data stream when reading image file"]


def test_files_without_end_are_read_only_as_far_as_they_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(KINDS["plain.jpg"])
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        for name in cycle([str(path)]):
            taken += 1
            yield name

    before = threading.active_count()
    with closing(LooseLoader(CONFIG, CPU)) as loader, closing(loader.batches(endless(), print)) as batches:
        for _ in range(3):
            next(batches)
        assert taken < 300  # chunks of 4, 8, 16 and 32 files, and the files in flight
    for thread in threading.enumerate():
        if thread.name == "files":
            thread.join(10)
    assert threading.active_count() <= before


def test_what_goes_wrong_while_paths_are_found_reaches_who_waits() -> None:
    def failing() -> Iterator[str]:
        raise DatasetError("cannot list photos (Permission denied)")
        yield ""

    with pytest.raises(DatasetError, match="cannot list photos"):
        next(read_chunks(failing(), PixelOptions(), 4, 1))


def test_chunks_end_at_whole_batches_of_readable_files(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(KINDS["plain.jpg"])
    names = [str(path)] * 10 + ["missing"] + [str(path)] * 20
    chunks = list(read_chunks(names, PixelOptions(), 4, 2))
    assert [len(chunk.files) for chunk in chunks] == [4, 8, 16, 2]
    assert [len(chunk.complaints) for chunk in chunks] == [0, 1, 0, 0]


def test_large_files_end_a_chunk_early_but_at_a_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(KINDS["plain.jpg"])
    monkeypatch.setattr(loose_files, "_CHUNK_BYTES", 1)
    assert [len(chunk.files) for chunk in read_chunks([str(path)] * 11, PixelOptions(), 4, 2)] == [4, 4, 3]


def test_what_only_the_decoder_finds_is_left_out_too(make_shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = files_of(make_shards(size=None, extension="jpg", test=2), "test", tmp_path)
    config = replace(CONFIG, loader="resident")
    _, whole, _ = served(paths, config)
    files = [read_file(path, PixelOptions()) for path in paths]
    files[5] = LooseFile(paths[5], files[5].sample._replace(height=files[5].sample.height + 1))
    monkeypatch.setattr(loose, "read_chunks", lambda *arguments: (chunk for chunk in [Chunk(files, [])]))
    names, images, complaints = served(paths, config)
    assert names == paths[:5] + paths[6:]
    assert torch.equal(images, torch.cat([whole[:5], whole[6:]]))
    assert complaints == [f"{paths[5]} is not a readable image: DALI does not decode it"]
