"""Loader `resident`: what it keeps, what it needs, and that its pixels are those other loaders decode."""

from __future__ import annotations

import gc
import io
import shutil
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from pipelines.config import AugmentConfig, DataConfig, ResidentConfig
from pipelines.conversion import ExecutorOptions, WriteOptions, write_shards
from pipelines.datasets import DatasetOptions, open_dataset
from pipelines.format import ShardSet, open_shards
from pipelines.loaders import PlannedLoader, build_loader
from pipelines.loaders.planned import PixelRequest
from pipelines.loaders.resident import ResidentPixels
from pipelines.loaders.resident_crops import HostCrops
from pipelines.loaders.resident_size import free_host_bytes, kept_sizes, largest_side, require_host_room, resident_bytes
from pipelines.types import BackendError, Batch, DamagedSampleError

CPU = torch.device("cpu")


def config_for(**changes: Any) -> DataConfig:
    settings = {"loader": "resident", "batch_size": 16, "image_size": 32, "num_threads": 2} | changes
    return DataConfig(**settings)


def loader_for(shards: ShardSet, split: str = "train", device: torch.device = CPU, **changes: Any) -> PlannedLoader:
    return build_loader(shards, split, config_for(**changes), seed=0, device=device)


def source_for(shards: ShardSet, split: str = "train", **changes: Any) -> ResidentPixels:
    data, config = shards.split(split), config_for(**changes)
    return ResidentPixels(PixelRequest(shards=shards, split=data, config=config, training=True, device=CPU, rank=0, world_size=1, seed=0))


def collect(loader: PlannedLoader, epoch: int = 0, start_step: int = 0) -> list[Batch]:
    batches = list(loader.epoch(epoch, start_step))
    loader.close()
    return batches


@pytest.fixture(scope="module")
def photographs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Shards of 48 photographs as they are, in one class."""
    folder = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 48), ("val", 1), ("test", 16)):
        (folder / "images" / split / "photo").mkdir(parents=True)
        for source in sorted((shared_data / "photos").glob("*.[jJ]*"))[:count]:
            (folder / "images" / split / "photo" / source.name).symlink_to(source)
    opened = open_dataset("folder", DatasetOptions(source=folder / "images"))
    orders = {name: np.arange(len(split.labels_N)) for name, split in opened.splits.items()}
    write_shards(opened, orders, folder / "shards", WriteOptions(executor=ExecutorOptions(num_processes=1)))
    return open_shards(folder / "shards")


# ---- sizes and memory


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600))
def test_images_keep_their_shape_and_are_never_enlarged(height: int, width: int, side: int) -> None:
    sizes = kept_sizes(np.array([height, 7]), np.array([width, 9]), side)
    kept = int(sizes.heights_N[0]), int(sizes.widths_N[0])
    if min(height, width) <= side:
        assert kept == (height, width)
    else:
        assert min(kept) == side
        assert abs(max(kept) - max(height, width) * side / min(height, width)) <= 0.5
        assert (kept[0] >= kept[1]) == (height >= width) or kept[0] == kept[1]
    assert sizes.offsets_N.tolist() == [0, kept[0] * kept[1] * 3]
    assert sizes.num_bytes == int((sizes.heights_N * sizes.widths_N).sum()) * 3


def test_the_bytes_announced_are_those_kept(make_shards: Any) -> None:
    shards = make_shards(size=None, extension="jpg")
    changes = {"resident": ResidentConfig(min_side=50)}
    source = source_for(shards, **changes)
    heights_N, widths_N = source.stored_sizes
    assert resident_bytes(shards.split("train"), config_for(**changes)) == int((heights_N * widths_N).sum()) * 3
    assert np.minimum(heights_N, widths_N).max() == 50
    source.close()


def test_min_side_is_by_default_what_evaluation_needs(make_shards: Any) -> None:
    source = source_for(make_shards(size=(60, 90), extension="jpg"), image_size=32)
    assert {tuple(size) for size in zip(*(part.tolist() for part in source.stored_sizes), strict=True)} == {(37, 56)}
    source.close()


def test_too_little_memory_is_one_sentence_that_says_what_fits(make_shards: Any) -> None:
    split = make_shards(size=(60, 90), extension="jpg").split("train")
    config = config_for(resident=ResidentConfig(min_side=60))
    needed = resident_bytes(split, config)
    require_host_room(split, config, needed * 2)
    with pytest.raises(BackendError, match=r"needs 0\.0 GiB for the 74 images of 'train' at shorter side 60, and 0\.0 GiB") as caught:
        require_host_room(split, config, needed // 2)
    named = int(str(caught.value).split("--set data.resident.min_side=")[1].split(",")[0])
    assert named == largest_side(split, int(needed // 2 * 0.9), 60)
    assert resident_bytes(split, config_for(resident=ResidentConfig(min_side=named))) <= needed // 2 * 0.9
    assert resident_bytes(split, config_for(resident=ResidentConfig(min_side=named + 1))) > needed // 2 * 0.9
    with pytest.raises(BackendError, match="take --loader dali") as caught:
        require_host_room(split, config, needed // 5)
    assert "min_side" not in str(caught.value)  # 24 px would fit, crops need 32


def test_memory_is_compared_before_anything_is_decoded(make_shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.loaders.resident.free_host_bytes", lambda: 1000)
    monkeypatch.setitem(sys.modules, "pipelines.loaders.resident_fill", None)  # an import of it would fail
    with pytest.raises(BackendError, match="loader 'resident' needs"):
        loader_for(make_shards())


def test_free_memory_is_below_the_machines() -> None:
    total = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 1 << 20 < free_host_bytes() < total


# ---- pixels


def test_whole_images_are_kept_exactly_where_none_is_larger(make_shards: Any) -> None:
    """Also in a set where others are shrunk."""
    shards = make_shards(size=None, extension="png", name="mixed-sizes")
    split = shards.split("test")
    source = source_for(shards, "test", resident=ResidentConfig(min_side=52))
    stored, sizes = source._crops._threads._stored[0], source._sizes  # type: ignore[attr-defined]
    kept = np.flatnonzero(np.minimum(split.heights_N, split.widths_N) <= 52)
    assert 0 < len(kept) < len(split)
    for i in kept:
        with Image.open(io.BytesIO(split.encoded(np.array([i]))[0].tobytes())) as image:
            start = sizes.offsets_N[i]
            np.testing.assert_array_equal(stored[start : start + image.width * image.height * 3], np.asarray(image).reshape(-1))
    source.close()


@pytest.mark.parametrize(("split", "limits"), [("test", (3.0, 6.0)), ("train", (3.0, 9.0))])
def test_photographs_agree_with_dali(photographs: ShardSet, split: str, limits: tuple[float, float]) -> None:
    """Windows are drawn in whole pixels of differently sized images, so compared are means over 8 × 8; full detail only loosely."""
    both = [collect(loader_for(photographs, split, loader=name, image_size=224))[0] for name in ("dali", "resident")]
    pixels = [batch.images_SHWC.permute(0, 3, 1, 2).float() for batch in both]
    assert (functional.avg_pool2d(pixels[0], 8) - functional.avg_pool2d(pixels[1], 8)).abs().mean() < limits[0]
    assert (pixels[0] - pixels[1]).abs().mean() < limits[1]


def test_thread_count_does_not_change_pixels_and_resume_is_exact(make_shards: Any) -> None:
    shards = make_shards(size=None, extension="jpg")
    augment = AugmentConfig(color_jitter=(0.4, 0.4, 0.4))
    whole = collect(loader_for(shards, augment=augment, num_threads=1), epoch=2)
    for num_threads, start_step in ((3, 0), (2, 2)):
        resumed = collect(loader_for(shards, augment=augment, num_threads=num_threads), epoch=2, start_step=start_step)
        for one, other in zip(whole[start_step:], resumed, strict=True):
            assert torch.equal(one.images_SHWC, other.images_SHWC)


def test_a_batch_that_is_kept_is_not_written_again(make_shards: Any) -> None:
    loader = loader_for(make_shards())
    first = next(iter(loader.epoch(0)))
    before = first.images_SHWC.clone()
    for epoch in range(3):
        for _ in loader.epoch(epoch):
            pass
    assert torch.equal(first.images_SHWC, before)
    loader.close()


def test_memory_of_batches_comes_back(make_shards: Any) -> None:
    source = source_for(make_shards())
    crops = source._crops
    assert isinstance(crops, HostCrops)
    lent = [crops._lend(8) for _ in range(6)]
    addresses = {part.ctypes.data for part in lent}
    del lent
    again = [crops._lend(32) for _ in range(4)]
    assert {part.ctypes.data for part in again} < addresses
    assert not crops._free  # two of six were more than is kept
    source.close()


def test_closing_and_abandoning_leave_no_threads_and_no_images(make_shards: Any) -> None:
    before = threading.active_count()
    held = []
    for closed in (True, False):
        source = source_for(make_shards())
        loader = loader_for(make_shards())
        next(iter(loader.epoch(0)))
        held += [weakref.ref(source), weakref.ref(loader)]
        if closed:
            loader.close()
            source.close()
            assert threading.active_count() <= before
            assert source._crops._threads._stored[0].size == 0  # type: ignore[attr-defined]
        del loader, source
    gc.collect()
    assert [reference() for reference in held] == [None] * 4
    deadline_s = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline_s:  # threads nobody waited for end by themselves
        time.sleep(0.01)
    assert threading.active_count() <= before


class TestDamagedImages:
    def damaged(self, make_shards: Any, tmp_path: Path, sample_id: int = 5) -> ShardSet:
        """One image cut to half its bytes: what follows is zeros."""
        root = tmp_path / "shards"
        shutil.copytree(make_shards(size=(48, 48), extension="jpg").root, root)
        record = np.load(root / "train.index.npy")[sample_id]
        with (root / f"train-{record['shard']:06d}.tar").open("r+b") as tar:
            kept = int(record["size"]) // 2
            tar.seek(int(record["offset"]) + kept)
            tar.write(b"\0" * (int(record["size"]) - kept))
        return open_shards(root)

    def test_stop_names_it(self, make_shards: Any, tmp_path: Path) -> None:
        with pytest.raises(DamagedSampleError, match=r"sample 00000005 of .* does not decode"):
            loader_for(self.damaged(make_shards, tmp_path))

    def test_skip_goes_on_with_another_of_its_class(self, make_shards: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        shards = self.damaged(make_shards, tmp_path)
        cache = tmp_path / "cache"
        loader = loader_for(shards, on_error="skip", resident=ResidentConfig(cache=str(cache)))
        batches = collect(loader)
        ids = np.concatenate([batch.ids_S for batch in batches])
        assert 5 not in ids
        assert len(ids) == 2 * 74
        assert "sample 00000005" in caplog.text
        assert all(batch.images_SHWC.flatten(1).any(1).all() for batch in batches)  # none of them is the hole
        assert not list(cache.iterdir())  # a set with holes is not for other runs


def test_batches_are_independent_of_the_batch_before(make_shards: Any) -> None:
    """The threads' rows and columns are reused from image to image: what one leaves behind must not show in the next."""
    shards = make_shards(size=None, extension="jpg")
    small = collect(loader_for(shards, "test", batch_size=1))
    large = collect(loader_for(shards, "test", batch_size=20))
    assert torch.equal(torch.cat([batch.images_SHWC for batch in small]), large[0].images_SHWC)


# ---- CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("room", ["device", "host"])
def test_a_device_delivers_what_the_host_crops(make_shards: Any, monkeypatch: pytest.MonkeyPatch, room: str) -> None:
    """PNG decodes to the same bits everywhere, so both ways must give the same batches as the host."""
    if room == "host":
        monkeypatch.setattr("pipelines.loaders.resident.fits_device", lambda *_: False)
    augment = AugmentConfig(color_jitter=(0.4, 0.4, 0.4))
    expected = collect(loader_for(make_shards(), augment=augment))
    found = collect(loader_for(make_shards(), device=torch.device("cuda"), augment=augment))
    for one, other in zip(expected, found, strict=True):
        assert other.images_SHWC.device.type == "cuda"
        assert torch.equal(one.images_SHWC, other.images_SHWC.cpu())
