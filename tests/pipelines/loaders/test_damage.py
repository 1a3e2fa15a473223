"""Samples and shards that are damaged after the shards were made: named before a decoder meets them, and stood in for if asked."""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import AugmentConfig, DaliConfig, DataConfig
from pipelines.format import ShardSet, ShardSplit, open_shards
from pipelines.loaders import PlannedLoader, build_loader
from pipelines.loaders.damage import SampleGuard, explain_failure
from pipelines.types import BackendError, Batch, DamagedSampleError, ShardError

HAS_FFCV = find_spec("ffcv") is not None
ROOT = Path(__file__).resolve().parents[3]
Damage = Callable[[bytes], bytes]
ZEROED_END: Damage = lambda image: image[: len(image) // 2] + bytes(len(image) - len(image) // 2)  # noqa: E731
ZEROED_START: Damage = lambda image: bytes(64) + image[64:]  # noqa: E731


def resized_header(height: int, width: int) -> Damage:
    """Writes another size into the JPEG's frame header; both ends stay as they are."""

    def how(image: bytes) -> bytes:
        place = image.index(b"\xff\xc0") + 5
        return image[:place] + struct.pack(">HH", height, width) + image[place + 4 :]

    return how


def without_a_table(image: bytes) -> bytes:
    """Overwrites a Huffman table: decoders see it only when they get there."""
    place = image.index(b"\xff\xc4") + 5
    return image[:place] + b"\xff" * 16 + image[place + 16 :]


OVERWRITTEN: Damage = lambda image: np.random.default_rng(0).bytes(len(image))  # noqa: E731


def copied(make_shards: Any, tmp_path: Path, **options: Any) -> ShardSet:
    root = tmp_path / "shards"
    root.parent.mkdir(exist_ok=True)
    shutil.copytree(make_shards(**({"size": (48, 48), "extension": "jpg"} | options)).root, root)
    return open_shards(root)


def damage(shards: ShardSet, split: str, ids: list[int], how: Damage = ZEROED_END) -> ShardSet:
    """Overwrites the images of `ids` in their tars, in place."""
    found = shards.split(split)
    for sample_id in ids:
        start, size = int(found.offsets_N[sample_id]), int(found.sizes_N[sample_id])
        with found.paths[int(found.shards_N[sample_id])].open("r+b") as tar:
            tar.seek(start)
            image = tar.read(size)
            tar.seek(start)
            tar.write(how(image))
    return open_shards(Path(shards.root))


def loader_for(
    shards: ShardSet, loader: str, on_error: str = "stop", split: str = "train", dali: DaliConfig | None = None
) -> PlannedLoader:
    augment = AugmentConfig(area_range=(0.3, 1.0))
    config = DataConfig(
        loader=loader, batch_size=8, image_size=32, num_threads=2, augment=augment, on_error=on_error, dali=dali or DaliConfig()
    )
    return build_loader(shards, split, config, seed=7, device=torch.device("cpu"))


def ids_of(batches: list[Batch]) -> list[list[int]]:
    return [batch.ids_S.tolist() for batch in batches]


class TestTheGuard:
    @pytest.mark.parametrize("how", [ZEROED_END, ZEROED_START, OVERWRITTEN], ids=["zeroed end", "zeroed start", "overwritten"])
    def test_names_what_lost_its_beginning_or_end(self, make_shards: Any, tmp_path: Path, how: Damage) -> None:
        split = damage(copied(make_shards, tmp_path), "train", [5, 9], how).split("train")
        with pytest.raises(DamagedSampleError, match=r"sample 00000005 of \S+, sample 00000009 of \S+ do not decode") as caught:
            SampleGuard(split).require_whole(np.arange(20))
        assert caught.value.ids.tolist() == [5, 9]

    @pytest.mark.parametrize("extension", ["jpg", "png"])
    def test_lets_every_whole_image_pass(self, make_shards: Any, extension: str) -> None:
        split = make_shards(size=(48, 48), extension=extension).split("train")
        SampleGuard(split).require_whole(np.arange(len(split)))

    def test_an_image_with_bytes_after_its_end_is_whole(self, make_shards: Any, tmp_path: Path) -> None:
        shards = copied(make_shards, tmp_path)
        index_file = Path(shards.root) / "train.index.npy"
        index = np.load(index_file)
        index["size"][3] += 3  # into the padding behind the image: zeros
        np.save(index_file, index)
        guard = SampleGuard(open_shards(Path(shards.root)).split("train"))
        for _ in range(2):
            guard.require_whole(np.arange(8))

    def test_a_shard_cut_short_is_named_without_touching_it(self, make_shards: Any, tmp_path: Path) -> None:
        shards = copied(make_shards, tmp_path)
        split = shards.split("train")
        guard, path = SampleGuard(split), split.paths[int(split.shards_N[0])]
        guard.require_whole(np.arange(4))
        with path.open("r+b") as tar:
            tar.truncate(1024)
        with pytest.raises(ShardError, match=re.escape(f"shard {path} was cut short while it was read")):
            guard.require_whole(np.arange(4))


def test_a_shard_deleted_while_training_is_read_to_the_end(make_shards: Any, tmp_path: Path) -> None:
    shards = copied(make_shards, tmp_path)
    expected = ids_of(list(loader_for(shards, "dali").epoch(0)))
    batches = loader_for(shards, "dali").epoch(0)
    seen = ids_of([next(batches)])
    for tar in Path(shards.root).glob("train-*.tar"):
        tar.unlink()
    assert seen + ids_of(list(batches)) == expected


def test_a_shard_cut_short_while_training_stops_it_with_its_name(make_shards: Any, tmp_path: Path) -> None:
    shards = copied(make_shards, tmp_path)
    batches = loader_for(shards, "dali").epoch(0)
    next(batches)
    time.sleep(0.3)  # what is in flight is decoded by then; a decoder that meets the cut is the bus error's case
    for tar in Path(shards.root).glob("train-*.tar"):
        with tar.open("r+b") as file:
            file.truncate(512)
    with pytest.raises(ShardError, match=r"shard \S+train-00000\d\.tar was cut short while it was read; copy it again"):
        list(batches)


class TestStopAndSkip:
    def test_stop_names_the_sample_and_the_loader_goes_on_with_another_epoch(self, make_shards: Any, tmp_path: Path) -> None:
        shards = damage(copied(make_shards, tmp_path), "train", [5])
        loader = loader_for(shards, "dali")
        for _ in range(2):  # also after the failure: DALI has given up the first pipeline
            with pytest.raises(DamagedSampleError, match=r"sample 00000005 of \S+train-00000\d\.tar does not decode"):
                list(loader.epoch(0))

    def test_skip_puts_the_next_sample_of_the_class_in_its_place_and_says_so_once(
        self, make_shards: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = copied(make_shards, tmp_path)
        expected = np.array([i for ids in ids_of(list(loader_for(whole, "dali").epoch(0))) for i in ids])
        shards = damage(whole, "train", [5, 11])
        labels_N = shards.split("train").labels_N
        loader = loader_for(shards, "dali", "skip")
        with caplog.at_level(logging.WARNING):
            batches = [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
        seen = np.array([i for ids in ids_of(batches)[: loader.num_steps] for i in ids])
        replaced = np.isin(expected, [5, 11])
        assert replaced.any()
        np.testing.assert_array_equal(seen[~replaced], expected[~replaced])
        np.testing.assert_array_equal(labels_N[seen], labels_N[expected])
        assert not np.isin(seen, [5, 11]).any()
        for sample_id in (5, 11):
            assert sum(f"sample {sample_id:08d}" in record.getMessage() for record in caplog.records) == 1
        for batch in batches:
            assert batch.labels_S.tolist() == labels_N[batch.ids_S].tolist()

    def test_skip_is_the_same_wherever_a_run_is_resumed(self, make_shards: Any, tmp_path: Path) -> None:
        shards = damage(copied(make_shards, tmp_path), "train", [5, 11, 30])
        expected = list(loader_for(shards, "dali", "skip").epoch(0))
        for start_step in range(0, len(expected), 3):
            resumed = list(loader_for(shards, "dali", "skip").epoch(0, start_step))
            assert ids_of(resumed) == ids_of(expected[start_step:])
            for one, other in zip(resumed, expected[start_step:], strict=True):
                assert torch.equal(one.images_SHWC, other.images_SHWC)

    def test_a_class_without_another_sample_stops(self, make_shards: Any, tmp_path: Path) -> None:
        shards = copied(make_shards, tmp_path, train=(12, 6, 1))
        only = int(np.flatnonzero(shards.split("train").labels_N == 2)[0])
        with pytest.raises(DamagedSampleError, match=f"sample {only:08d}"):
            list(loader_for(damage(shards, "train", [only]), "dali", "skip").epoch(0))

    def test_evaluation_never_skips(self, make_shards: Any, tmp_path: Path) -> None:
        shards = damage(copied(make_shards, tmp_path), "test", [2])
        with pytest.raises(DamagedSampleError, match="sample 00000002"):
            list(loader_for(shards, "dali", "skip", split="test").epoch(0))


INSIDE = {
    "a size of gigabytes": resized_header(65535, 65535),
    "a smaller size": resized_header(24, 48),
    "a larger size": resized_header(96, 96),
    "no table": without_a_table,
}
DECODERS = ["dali", "index", "resident", pytest.param("ffcv", marks=pytest.mark.skipif(not HAS_FFCV, reason="FFCV is not installed"))]


@pytest.mark.parametrize("loader", DECODERS)
def test_damage_inside_an_image_is_named_or_skipped_by_name(make_shards: Any, tmp_path: Path, loader: str) -> None:
    """What both ends do not show, in a process of its own because DALI may crash on it."""
    # A region that lies in both sizes decodes to something; only a look at the whole image tells.
    hows = {name: how for name, how in INSIDE.items() if name != "a larger size" or loader in ("resident", "ffcv")}
    roots = []
    for number, how in enumerate(hows.values()):
        shards = damage(copied(make_shards, tmp_path / str(number), beton=loader == "ffcv"), "train", [5], how)
        if loader == "ffcv":
            damage_beton(shards, 5, how)
        roots.append(str(shards.root))
    command = [sys.executable, __file__, loader, *roots]
    for _ in range(4):  # a crash is DALI's and not what this shows
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        if found.returncode >= 0:
            break
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    for name, stopped, skipped in zip(hows, lines[::2], lines[1::2], strict=True):
        assert re.match(r"DamagedSampleError sample 00000005 of \S+ does not decode; ", stopped), (name, stopped)
        assert skipped == "went on without [5]", name
    assert found.stderr.count("sample 00000005") == len(hows)


def damage_beton(shards: ShardSet, sample_id: int, how: Damage) -> None:
    """The beton's copy of the image is the same bytes."""
    path, split = Path(shards.root) / "train.beton", shards.split("train")
    damaged = split.encoded(np.array([sample_id]))[0].tobytes()
    content = path.read_bytes()
    places = [found.start() for found in re.finditer(rb"\xff\xd8\xff", content)]
    for place in places:
        whole = content[place : place + len(damaged)]
        if how(whole) == damaged:
            path.write_bytes(content[:place] + damaged + content[place + len(damaged) :])
            return
    raise AssertionError("the beton does not hold the image")


def main(loader: str, *roots: str) -> None:
    """What the test above runs: the error with `on_error` "stop", then an epoch with "skip"."""
    feed = DaliConfig(feed="index" if loader == "index" else "memory")
    for root, on_error in itertools.product(roots, ("stop", "skip")):
        try:
            built = loader_for(open_shards(Path(root)), "dali" if loader == "index" else loader, on_error, dali=feed)
            seen = {i for batch in built.epoch(0) for i in batch.ids_S.tolist()}
            sys.stdout.write(f"went on without {sorted(set(range(74)) - seen)}\n")
        except DamagedSampleError as error:
            sys.stdout.write(f"DamagedSampleError {error}\n")


class TestWhatDaliSays:
    def split(self, make_shards: Any) -> ShardSplit:
        split: ShardSplit = make_shards(size=(48, 48), extension="jpg").split("train")
        return split

    def test_the_sample_among_those_in_flight_is_named(self, make_shards: Any, tmp_path: Path) -> None:
        split = damage(copied(make_shards, tmp_path), "train", [5]).split("train")
        found = explain_failure(RuntimeError("Critical error in pipeline"), split, np.arange(3, 9))
        assert isinstance(found, DamagedSampleError)
        assert re.search(r"sample 00000005 of \S+train-00000\d\.tar does not decode", str(found))

    def test_samples_that_decode_are_not_blamed(self, make_shards: Any) -> None:
        message = "Critical error in pipeline:\nError in CPU operator x\n\nencountered:\n\nout of memory\nCurrent pipeline object"
        found = explain_failure(RuntimeError(message), self.split(make_shards), np.arange(8))
        assert isinstance(found, BackendError)
        assert str(found) == "DALI failed while decoding: out of memory"


if __name__ == "__main__":
    main(*sys.argv[1:])
