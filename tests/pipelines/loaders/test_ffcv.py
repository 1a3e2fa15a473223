"""Loader `ffcv` shows what `dali` shows, can stop and start anywhere, leaves nothing behind, and names what is wrong with a beton."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

from pipelines.config import AugmentConfig, DataConfig, OrderConfig
from pipelines.conversion import ExecutorOptions, WriteOptions, write_shards
from pipelines.datasets import DatasetOptions, open_dataset
from pipelines.format import ShardSet, open_shards
from pipelines.format.ffcv_package import import_ffcv
from pipelines.loaders import PlannedLoader, build_loader
from pipelines.types import SPLITS, BackendError, Batch, DamagedSampleError, EncodedSample, OpenDataset, ShardError, Split

MakeShards = Callable[..., ShardSet]
CPU = torch.device("cpu")
RESIZED = AugmentConfig(crop="resized", area_range=(0.3, 1.0))


@pytest.fixture(scope="module", autouse=True)
def _ffcv() -> None:
    try:
        import_ffcv("ffcv.loader", "this test")
    except BackendError as error:
        pytest.skip(str(error))


def loader_for(
    shards: ShardSet, loader: str = "ffcv", split: str = "train", rank: int = 0, world_size: int = 1, **changes: Any
) -> PlannedLoader:
    order = OrderConfig(sampling="class-balanced")
    config = DataConfig(loader=loader, batch_size=16, image_size=32, num_threads=2, order=order, augment=RESIZED)
    return build_loader(shards, split, replace(config, **changes), seed=0, device=CPU, rank=rank, world_size=world_size)


def collect(loader: PlannedLoader, epoch: int = 0, start_step: int = 0) -> list[Batch]:
    batches = list(loader.epoch(epoch, start_step))
    loader.close()
    return batches


def photo_shards(make_shards: MakeShards, **options: Any) -> ShardSet:
    """JPEGs of 40 to 79 px, each another size."""
    return make_shards(size=None, extension="jpg", name="folder", beton=True, **options)


def copied(shards: ShardSet, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards.root, tmp_path / "shards"))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert (one.epoch, one.step, one.ids_S.tolist()) == (other.epoch, other.step, other.ids_S.tolist())
        torch.testing.assert_close(one.images_SHWC, other.images_SHWC, rtol=0, atol=0)


def largest_difference(first: list[Batch], second: list[Batch]) -> float:
    """The largest mean difference of an image, in levels."""
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.ids_S, other.ids_S)
    pairs = [(one.images_SHWC.float(), other.images_SHWC.float()) for one, other in zip(first, second, strict=True)]
    return max(float((one - other).abs().mean((1, 2, 3)).max()) for one, other in pairs)


class TestSameRegionsAsDali:
    @pytest.mark.parametrize("padding", [4, 40])
    def test_shifted_and_flipped_lossless_images_are_equal_to_the_last_level(self, make_shards: MakeShards, padding: int) -> None:
        """With a padding of 40 px some crops hold nothing of the image."""
        shards, augment = make_shards(beton=True), AugmentConfig(crop="pad", padding=padding, eval_crop=1.0)
        for split in ("train", "test"):
            ours, dali = (collect(loader_for(shards, name, split=split, augment=augment)) for name in ("ffcv", "dali"))
            assert len(ours) == (5 if split == "train" else 2)
            assert_same(ours, dali)

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_photographs(self, shared_data: Path, tmp_path: Path, split: str) -> None:
        """Decoders and resampling filters differ by a few levels; a wrong crop or a missing flip by tens."""
        for name in SPLITS:
            (tmp_path / "photos" / name / "photo").mkdir(parents=True)
            for source in sorted((shared_data / "photos").iterdir())[:: 10 if name == split else 150]:
                (tmp_path / "photos" / name / "photo" / source.name).symlink_to(source)
        opened = open_dataset("folder", DatasetOptions(source=tmp_path / "photos"))
        orders = {name: np.arange(len(part.labels_N)) for name, part in opened.splits.items()}
        write_shards(opened, orders, tmp_path / "shards", WriteOptions(formats=("wds", "ffcv"), executor=ExecutorOptions(num_processes=1)))
        augment = AugmentConfig(crop="resized", area_range=(0.1, 1.0))
        shards = open_shards(tmp_path / "shards")
        ours, dali = (collect(loader_for(shards, name, split=split, image_size=128, augment=augment)) for name in ("ffcv", "dali"))
        assert largest_difference(ours, dali) < 6
        assert largest_difference(ours[:1], [replace(dali[0], images_SHWC=dali[0].images_SHWC.flip(2))]) > 20


class TestOrder:
    @pytest.mark.parametrize("start_step", [1, 3, 4])
    def test_an_epoch_begun_in_the_middle_is_the_rest_of_a_whole_one(self, make_shards: MakeShards, start_step: int) -> None:
        whole = collect(loader_for(photo_shards(make_shards)), epoch=2)
        used = loader_for(photo_shards(make_shards))
        next(used.epoch(2))
        assert_same(collect(used, epoch=2, start_step=start_step), whole[start_step:])

    def test_pixels_do_not_depend_on_threads_or_batches_ahead(self, make_shards: MakeShards) -> None:
        expected = collect(loader_for(photo_shards(make_shards), num_threads=1, prefetch_batches=1))
        for num_threads, prefetch_batches in ((2, 1), (0, 4), (1000, 2)):
            found = collect(loader_for(photo_shards(make_shards), num_threads=num_threads, prefetch_batches=prefetch_batches))
            assert_same(found, expected)

    def test_a_sample_drawn_twice_in_a_batch_is_cropped_twice(self, make_shards: MakeShards) -> None:
        """One batch holds the whole set: the instance half each image once, the partner half 74 draws of the same images."""
        shards = photo_shards(make_shards)
        batch = collect(loader_for(shards, batch_size=74, augment=replace(RESIZED, crop="none", flip=False)))[0]
        cropped = collect(loader_for(shards, batch_size=74))[0]
        first = {}
        repeats = [(first[i], place) for place, i in enumerate(batch.ids_S.tolist()) if first.setdefault(i, place) != place]
        assert len(repeats) == 74
        assert all(torch.equal(batch.images_SHWC[one], batch.images_SHWC[other]) for one, other in repeats)
        assert not any(torch.equal(cropped.images_SHWC[one], cropped.images_SHWC[other]) for one, other in repeats)

    @pytest.mark.parametrize("world_size", [1, 3])
    def test_evaluation_counts_each_sample_once_and_keeps_the_smaller_last_batch(self, make_shards: MakeShards, world_size: int) -> None:
        ranks = [collect(loader_for(photo_shards(make_shards), split="test", rank=r, world_size=world_size)) for r in range(world_size)]
        assert sorted(i for batches in ranks for batch in batches for i in batch.ids_S.tolist()) == list(range(20))
        assert sum(len(batches[-1].ids_S) for batches in ranks) == 4

    def test_a_batch_that_is_kept_is_not_written_over(self, make_shards: MakeShards) -> None:
        loader = loader_for(photo_shards(make_shards))
        batches = loader.epoch(0)
        kept = next(batches)
        as_delivered = kept.images_SHWC.clone()
        assert len(list(batches)) == 4
        assert len(list(loader.epoch(1))) == 5
        loader.close()
        gc.collect()
        torch.testing.assert_close(kept.images_SHWC, as_delivered, rtol=0, atol=0)

    def test_training_and_evaluation_at_once(self, make_shards: MakeShards) -> None:
        shards = photo_shards(make_shards)
        train, test = loader_for(shards), loader_for(shards, split="test")
        together = list(zip(train.epoch(0), test.epoch(0), strict=False))
        train.close()
        test.close()
        assert_same([one for one, _ in together], collect(loader_for(shards))[:2])
        assert_same([other for _, other in together], collect(loader_for(shards, split="test")))


class TestNothingIsLeft:
    def test_functions_that_write_bytes_still_compile(self, make_shards: MakeShards) -> None:
        held = numba.uint8[::1]  # as any compiled function holds it
        collect(loader_for(photo_shards(make_shards)))

        @numba.njit
        def fill(pixels_N):  # type: ignore[no-untyped-def]
            pixels_N[0] = 7

        pixels_N = np.zeros(3, np.uint8)
        fill(pixels_N)
        assert held.mutable
        assert pixels_N[0] == 7

    def test_abandoned_epochs_keep_no_thread(self, make_shards: MakeShards) -> None:
        """An iterator of FFCV itself keeps its thread and its buffers until the process ends (issues 206, 345 and 393 of libffcv/ffcv)."""
        loader, threads_before = loader_for(photo_shards(make_shards)), threading.active_count()
        for epoch in range(50):
            batches = loader.epoch(epoch, epoch % 3)
            next(batches)
            batches.close()  # type: ignore[attr-defined]
            assert threading.active_count() <= threads_before + 1  # that of this epoch, until the next one begins
        loader.close()
        assert threading.active_count() == threads_before

    def test_abandoned_epochs_keep_no_memory(self, make_shards: MakeShards) -> None:
        """A batch has 38 MB: more than the C library ever keeps for itself when it is freed."""
        loader = loader_for(photo_shards(make_shards), batch_size=24, image_size=512)
        resident_bytes = []
        for epoch in range(20):
            next(loader.epoch(epoch))
            resident_bytes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        loader.close()
        # What runs ahead when it is looked at differs by up to three batches; iterators that FFCV does not end would leave 1.5 GB.
        assert max(resident_bytes[-3:]) - max(resident_bytes[2:5]) < 150e6

    def test_a_process_that_stops_in_the_middle_says_nothing(self, make_shards: MakeShards) -> None:
        """And its thread counts, which FFCV sets to its own, are what they were."""
        script = f"""
import warnings
warnings.simplefilter("error")
import numba, torch
from pathlib import Path
from pipelines.config import AugmentConfig, DataConfig
from pipelines.format import open_shards
from pipelines.loaders import build_loader

def main():
    torch.set_num_threads(2)
    config = DataConfig(loader="ffcv", batch_size=16, num_threads=1)
    loader = build_loader(open_shards(Path({str(photo_shards(make_shards).root)!r})), "train", config, seed=0, device=torch.device("cpu"))
    batches = loader.epoch(0)
    next(batches), next(batches)
    assert torch.get_num_threads() == 2
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS

main()
"""
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), done.stderr


class TestWhatIsWrongIsNamed:
    @pytest.fixture
    def root(self, make_shards: MakeShards, tmp_path: Path) -> Path:
        return copied(photo_shards(make_shards), tmp_path)

    def place_of(self, root: Path, sample_id: int) -> tuple[int, int]:
        """Where a sample begins in the beton, and its bytes."""
        _, start, size = import_ffcv("ffcv.reader", "this test").Reader(str(root / "train.beton")).alloc_table[sample_id].tolist()
        return start, size

    def overwrite(self, root: Path, offset: int, content: bytes) -> None:
        with (root / "train.beton").open("r+b") as file:
            file.seek(offset)
            file.write(content)

    def test_shards_without_a_beton(self, make_shards: MakeShards) -> None:
        with pytest.raises(
            ShardError, match=r"no beton of its 'train' split.*make_shards\.py --dataset cifar10-lt --out \S+ --format wds,ffcv"
        ):
            loader_for(make_shards())

    def test_a_missing_beton(self, root: Path) -> None:
        (root / "train.beton").unlink()
        with pytest.raises(ShardError, match=rf"cannot open {root}/train\.beton: No such file or directory; copy it again"):
            loader_for(open_shards(root))

    def test_a_beton_that_was_cut_short(self, root: Path) -> None:
        os.truncate(root / "train.beton", 9 << 20)
        with pytest.raises(ShardError, match=rf"{root}/train\.beton has 9437184 bytes, the manifest says 16778992; copy"):
            loader_for(open_shards(root))

    def test_a_beton_that_is_cut_short_while_it_is_read(self, root: Path) -> None:
        loader = loader_for(open_shards(root), prefetch_batches=1)
        batches = loader.epoch(0)
        next(batches)
        os.truncate(root / "train.beton", 9 << 20)  # what has to be read still lies before that
        with pytest.raises(ShardError, match=rf"{root}/train\.beton was cut short while it was read"):
            list(batches)
        loader.close()
        assert not [thread for thread in threading.enumerate() if "EpochIterator" in type(thread).__mro__[1].__name__]

    @pytest.mark.parametrize(
        ("offset", "content"),
        [
            (0, b"\x07"),  # FFCV's format version
            (8, (75).to_bytes(8, "little")),  # number of samples
            (24, b"\xff"),  # number of the first field's type
            (24 + 2 * 1041 + 16, b"\x09"),  # label of sample 0
            (24 + 2 * 1041 + 24 * 3 + 8, b"\xff\xff"),  # where sample 3 begins
            (16 << 20, b"\x01"),  # first row of the table
        ],
    )
    def test_records_that_are_not_those_of_the_tars(self, root: Path, offset: int, content: bytes) -> None:
        self.overwrite(root, offset, content)
        with pytest.raises(ShardError, match=rf"{root}/train\.beton does not fit the tars of its split; copy .* again"):
            loader_for(open_shards(root))

    @pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
    def test_damaged_samples_are_named_after_the_batches_before_them(self, root: Path, keep: float) -> None:
        expected = collect(loader_for(open_shards(root)))
        sample_id = next(i for i in expected[3].ids_S.tolist() if all(i not in batch.ids_S for batch in expected[:3]))
        start, size = self.place_of(root, sample_id)
        self.overwrite(root, start + int(keep * size), b"\0" * (size - int(keep * size)))
        loader, delivered = loader_for(open_shards(root)), []
        with pytest.raises(DamagedSampleError, match=rf"sample {sample_id:08d} of {root}/train\.beton does not decode; copy") as raised:
            delivered.extend(islice(loader.epoch(0), 5))
        assert raised.value.ids.tolist() == [sample_id]
        del delivered, raised
        assert_same(list(islice(loader.epoch(0), 3)), expected[:3])
        loader.close()

    def test_training_goes_on_without_damaged_samples_if_asked(self, root: Path) -> None:
        expected = collect(loader_for(open_shards(root)))
        start, size = self.place_of(root, 7)
        self.overwrite(root, start + size // 2, b"\0" * (size // 2))
        found = collect(loader_for(open_shards(root), on_error="skip"))
        assert [batch.step for batch in found] == [0, 1, 2, 3, 4]
        for one, other in zip(found, expected, strict=True):
            kept = other.ids_S != 7
            np.testing.assert_array_equal(one.ids_S[kept], other.ids_S[kept])
            assert 7 not in one.ids_S

    def test_a_whole_image_that_libjpeg_complains_of_is_shown(self, tmp_path: Path) -> None:
        """Bytes between two segments are an error to FFCV's decoder and nothing to Pillow, with which shards are validated."""
        from PIL import Image

        path = tmp_path / "x.jpg"
        Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB").save(path)
        plain = path.read_bytes()
        encoded = [plain, plain[:-2] + b"\0\0\0" + plain[-2:]]

        def read(i: int) -> EncodedSample:
            return EncodedSample(encoded=encoded[i % 2], extension="jpg", label=i % 2, source=f"#{i}")

        part = Split(labels_N=np.arange(4) % 2, sources=["#"] * 4, read=read)
        dataset = OpenDataset(name="folder", class_names=("a", "b"), splits=dict.fromkeys(SPLITS, part))
        options = WriteOptions(formats=("wds", "ffcv"), executor=ExecutorOptions(num_processes=1))
        write_shards(dataset, dict.fromkeys(SPLITS, np.arange(4)), tmp_path / "shards", options)
        shards = open_shards(tmp_path / "shards")
        assert len(np.unique(shards.split("test").sizes_N)) == 2  # the converter has kept the odd bytes
        (batch,) = collect(loader_for(shards, split="test", augment=replace(RESIZED, eval_crop=1.0)))
        assert (batch.images_SHWC[0].float() - batch.images_SHWC[1].float()).abs().mean() < 2  # two inverse DCTs
        assert batch.images_SHWC[1].float().std() > 20

    def test_missing_ffcv_is_one_sentence(self, make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name == "ffcv" or name.startswith("ffcv.")]:
            monkeypatch.setitem(sys.modules, name, None)  # what Python itself does for a package that must not be found
        for name in ("ffcv", "ffcv_kernel", "ffcv_beton"):
            monkeypatch.delitem(sys.modules, f"pipelines.loaders.{name}", raising=False)
        with pytest.raises(BackendError, match=r"loader 'ffcv' needs FFCV.*pip install 'bce3s\[ffcv\]'"):
            loader_for(photo_shards(make_shards))

    def test_the_command_in_the_sentence_names_this_folder_and_data_set(self, root: Path) -> None:
        manifest = json.loads((root / "manifest.json").read_text())
        del manifest["splits"]["test"]["beton"]
        (root / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ShardError, match=rf"--dataset folder --out {root} --format wds,ffcv --overwrite'"):
            loader_for(open_shards(root), split="test")


@pytest.mark.cuda
def test_batches_on_cuda_are_those_on_the_host(make_shards: MakeShards) -> None:
    shards = photo_shards(make_shards)
    config = DataConfig(loader="ffcv", batch_size=16, image_size=32, num_threads=2, augment=RESIZED)
    host, device = (build_loader(shards, "train", config, seed=0, device=torch.device(name)) for name in ("cpu", "cuda"))
    for one, other in zip(collect(host), collect(device), strict=True):
        assert other.images_SHWC.is_cuda
        torch.testing.assert_close(one.images_SHWC, other.images_SHWC.cpu(), rtol=0, atol=0)
