"""Betons hold what the tars hold, by id, as stock FFCV reads it; they are byte-identical from run to run, and whole or absent."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipelines.conversion import beton
from pipelines.conversion.beton import check_beton, write_beton
from pipelines.format import ShardSplit
from pipelines.format.index import INDEX_DTYPE, sha256_file
from pipelines.format.tar import TarWriter
from pipelines.types import BackendError, EncodedSample, ShardError

MakeShards = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _ffcv() -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed; 'make env' names the line that installs what it needs")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(pixels: np.ndarray, kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def split_of(images: list[bytes], folder: Path, sizes: list[tuple[int, int]] | None = None) -> ShardSplit:
    """One tar of `images`, for what no prepared data set holds; the label of id i is i % 5. `sizes` (height, width) spares decoding."""
    folder.mkdir()
    records = []
    with (folder / "train-000000.tar").open("wb") as file:
        tar = TarWriter(file)
        for i, encoded in enumerate(images):
            width, height = sizes[i][::-1] if sizes else Image.open(io.BytesIO(encoded)).size
            offset = tar.add(i, EncodedSample(encoded=encoded, extension="jpg", label=i % 5, source=""))
            records.append((0, len(encoded), offset, i % 5, height, width))
        tar.finish()
    index = np.array(records, INDEX_DTYPE)
    np.save(folder / "train.index.npy", index)
    entry = {
        "num_samples": len(images),
        "class_counts": np.bincount(index["label"], minlength=5).tolist(),
        "shards": [{"file": "train-000000.tar", "num_samples": len(images), "shard_bytes": tar.num_bytes}],
        "index": {"file": "train.index.npy"},
    }
    return ShardSplit(folder, "train", entry)


def tar_bytes(split: ShardSplit, sample_id: int) -> bytes:
    return split.encoded(np.array([sample_id]))[0].tobytes()


def libjpeg_pixels(encoded: bytes) -> np.ndarray:
    """As FFCV decodes: libjpeg-turbo with its fast inverse DCT."""
    pixels: np.ndarray = simplejpeg.decode_jpeg(encoded, fastdct=True, fastupsample=False)
    return pixels


def read_by_ffcv(path: Path, image_decoder: Any, batch_size: int = 7) -> tuple[list[np.ndarray], list[int]]:
    """Every image and label, in the order of a stock loader without custom fields.

    In a child: what FFCV's loader leaves to the garbage collector complains at some later moment, in the middle of another test. Not forked
    from here: other tests have started threads in this process, and FFCV crashed in such a child.
    """
    out = path.with_suffix(".npz")
    child = multiprocessing.get_context("forkserver").Process(target=_load_all, args=(path, image_decoder, batch_size, out))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    with np.load(out) as read:
        return list(read["images"]), read["labels"].tolist()


def _load_all(path: Path, image_decoder: Any, batch_size: int, out: Path) -> None:
    from ffcv.fields.decoders import IntDecoder
    from ffcv.loader import Loader, OrderOption

    loader = Loader(
        str(path),
        batch_size=batch_size,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": [image_decoder], "label": [IntDecoder()]},
    )
    batches = [(images.copy(), labels[:, 0].copy()) for images, labels in loader]
    np.savez(out, images=np.concatenate([images for images, _ in batches]), labels=np.concatenate([labels for _, labels in batches]))
    os._exit(0)


@pytest.mark.filterwarnings("ignore")  # FFCV 1.0.2 is from 2023; its loader's warnings are not ours
class TestStockFfcvReadsIt:
    def test_png_gives_the_same_pixels_in_the_order_of_ids(self, make_shards: MakeShards, tmp_path: Path) -> None:
        from ffcv.fields.decoders import SimpleRGBImageDecoder

        split = make_shards().split("train")
        write_beton(split, tmp_path / "train.beton")
        images, labels = read_by_ffcv(tmp_path / "train.beton", SimpleRGBImageDecoder())
        assert labels == split.labels_N.tolist()
        for sample_id, pixels in enumerate(images):
            np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(tar_bytes(split, sample_id)))))

    def test_jpeg_grey_and_png_of_one_size_decode_alike(self, tmp_path: Path) -> None:
        from ffcv.fields.decoders import SimpleRGBImageDecoder

        kinds = [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L")]
        encoded = [encode(noise(24, 40, seed), *kinds[seed % 4]) for seed in range(16)]
        entry = write_beton(split_of(encoded, tmp_path / "shards"), tmp_path / "x.beton")
        assert entry is not None
        assert (entry["num_jpg"], entry["num_raw"]) == (8, 8)
        images, _ = read_by_ffcv(tmp_path / "x.beton", SimpleRGBImageDecoder())
        for original, pixels in zip(encoded, images, strict=True):
            pillow_pixels = np.asarray(Image.open(io.BytesIO(original)).convert("RGB"))
            if original.startswith(b"\x89PNG"):
                np.testing.assert_array_equal(pixels, pillow_pixels)
            else:
                np.testing.assert_array_equal(pixels, libjpeg_pixels(original))
                assert np.abs(pixels - pillow_pixels.astype(int)).max() <= 8  # Pillow has the slow inverse DCT

    @pytest.mark.slow  # FFCV compiles two pipelines
    def test_mixed_sizes_go_through_the_cropping_decoders(self, make_shards: MakeShards, tmp_path: Path) -> None:
        from ffcv.fields.decoders import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder

        split = make_shards(train=(12, 8, 5), size=None, extension="jpg", name="folder").split("train")
        write_beton(split, tmp_path / "train.beton")
        random_images, labels = read_by_ffcv(tmp_path / "train.beton", RandomResizedCropRGBImageDecoder((32, 32)))
        assert labels == split.labels_N.tolist()
        assert {image.shape for image in random_images} == {(32, 32, 3)}
        for sample_id, image in enumerate(read_by_ffcv(tmp_path / "train.beton", CenterCropRGBImageDecoder((32, 32), 1))[0]):
            pixels = libjpeg_pixels(tar_bytes(split, sample_id))
            # FFCV resizes by area; the mean over the crop survives any resizing, and tells these images apart.
            side = min(pixels.shape[:2])
            top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
            crop_mean = pixels[top : top + side, left : left + side].mean((0, 1))
            np.testing.assert_allclose(image.mean((0, 1)), crop_mean, atol=1.5)

    @pytest.mark.slow  # FFCV compiles another pipeline, for 40 MB
    def test_a_sample_larger_than_eight_mebibytes_gets_larger_pages(self, tmp_path: Path) -> None:
        from ffcv.fields.decoders import SimpleRGBImageDecoder
        from ffcv.reader import Reader

        pixels = [np.full((1700, 1800, 3), value, np.uint8) for value in (3, 90, 200)]
        split = split_of([encode(image, "PNG") for image in pixels], tmp_path / "shards")
        entry = write_beton(split, tmp_path / "x.beton")
        assert entry is not None
        assert Reader(str(tmp_path / "x.beton")).page_size == 16 << 20
        assert entry["beton_bytes"] == 4 * (16 << 20) + 3 * 24
        for image, read in zip(pixels, read_by_ffcv(tmp_path / "x.beton", SimpleRGBImageDecoder(), batch_size=2)[0], strict=True):
            np.testing.assert_array_equal(read, image)

    def test_header_and_records_are_where_ffcv_looks_for_them(self, make_shards: MakeShards, tmp_path: Path) -> None:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.reader import Reader
        from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType

        split = make_shards(train=(12, 8, 5), size=None, extension="jpg", name="folder").split("train")
        write_beton(split, tmp_path / "train.beton")
        reader = Reader(str(tmp_path / "train.beton"))
        assert {name: type(field) for name, field in reader.handlers.items()} == {"image": RGBImageField, "label": IntField}
        layout = beton.plan_beton(split)
        assert reader.metadata.tobytes() == layout.samples_N.tobytes()
        assert reader.alloc_table.tobytes() == layout.table_N.tobytes()
        sizes = [dtype.itemsize for dtype in (beton.HEADER_DTYPE, beton.FIELD_DTYPE, beton.TABLE_DTYPE)]
        assert sizes == [dtype.itemsize for dtype in (HeaderType, FieldDescType, ALLOC_TABLE_TYPE)]

    def test_jpeg_bytes_are_those_of_the_tar(self, make_shards: MakeShards, tmp_path: Path) -> None:
        from ffcv.reader import Reader

        split = make_shards(train=(12, 8, 5), size=None, extension="jpg", name="folder").split("train")
        write_beton(split, tmp_path / "train.beton")
        content = (tmp_path / "train.beton").read_bytes()
        for sample_id, start, size in Reader(str(tmp_path / "train.beton")).alloc_table.tolist():
            assert content[start : start + size] == tar_bytes(split, sample_id)


class TestWriting:
    def test_entry_progress_and_two_runs_agree(self, make_shards: MakeShards, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        split = make_shards(train=(90, 70, 60, 10)).split("train")
        steps: list[int] = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        entries = [write_beton(split, tmp_path / name / "train.beton", on_samples=steps.append) for name in ("a", "b")]
        path = tmp_path / "a" / "train.beton"
        assert path.read_bytes() == (tmp_path / "b" / "train.beton").read_bytes()
        assert entries[0] == entries[1]
        assert json.loads(json.dumps(entries[0])) == {
            "file": "train.beton",
            "num_samples": 230,
            "beton_bytes": path.stat().st_size,
            "sha256": sha256_file(path),
            "fields": ["image", "label"],
            "num_jpg": 0,
            "num_raw": 230,
        }
        assert steps == [100, 100, 30] * 2
        assert [file.name for file in path.parent.iterdir()] == ["train.beton"]
        assert capfd.readouterr() == ("", "")

    def test_samples_that_fill_pages_to_the_last_byte_lie_where_planned(self, tmp_path: Path) -> None:
        jpeg, mebibyte = encode(noise(8, 8), "JPEG"), 1 << 20
        sizes = [5 * mebibyte, 3 * mebibyte, 5 * mebibyte, 3 * mebibyte + 1, 8 * mebibyte, 1000]
        split = split_of([jpeg.ljust(size, b"\0") for size in sizes], tmp_path / "shards")
        entry = write_beton(split, tmp_path / "x.beton")
        assert entry is not None
        assert entry["beton_bytes"] == (1 + 5) * 8 * mebibyte + len(sizes) * 24
        assert list(check_beton(tmp_path / "x.beton", split)) == []

    def test_a_split_without_samples_has_no_beton(self, make_shards: MakeShards, tmp_path: Path) -> None:
        split = make_shards(val=0).split("val")
        assert write_beton(split, tmp_path / "val.beton") is None
        assert list(tmp_path.iterdir()) == []
        assert list(check_beton(tmp_path / "val.beton", split)) == []
        (tmp_path / "val.beton").write_bytes(b"left behind")
        (fault,) = check_beton(tmp_path / "val.beton", split)
        assert "should not exist" in fault

    def test_what_ffcv_cannot_hold_is_named(self, tmp_path: Path) -> None:
        split = split_of([encode(noise(8, 8), "PNG")] * 2, tmp_path / "shards", sizes=[(8, 8), (60_000, 60_000)])
        with pytest.raises(ShardError, match=r"sample 00000001 of .*train-000000\.tar takes 10800000000 bytes"):
            write_beton(split, tmp_path / "x.beton")

    @pytest.mark.parametrize(
        ("damaged", "sentence"),
        [
            (b"GIF89a" + b"\0" * 200, "is neither JPEG nor PNG"),
            (encode(noise(8, 8), "PNG")[:100], "does not decode"),
            (encode(noise(9, 8), "PNG"), "has another size than its index says"),
        ],
    )
    def test_a_damaged_tar_is_named_and_leaves_nothing(self, tmp_path: Path, damaged: bytes, sentence: str) -> None:
        split = split_of([encode(noise(8, 8), "PNG"), damaged], tmp_path / "shards", sizes=[(8, 8), (8, 8)])
        with pytest.raises(ShardError, match=rf"sample 00000001 of .*train-000000\.tar {sentence}"):
            write_beton(split, tmp_path / "x.beton")
        assert [file.name for file in tmp_path.iterdir()] == ["shards"]

    def test_missing_ffcv_names_the_extra_and_the_packages(
        self, make_shards: MakeShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "ffcv", None)  # what Python itself does for a package that must not be found
        monkeypatch.setitem(sys.modules, "ffcv.writer", None)
        with pytest.raises(BackendError, match=r"pip install 'bce3s\[ffcv\]'.*pkg-config libturbojpeg0-dev libopencv-dev"):
            write_beton(make_shards().split("train"), tmp_path / "train.beton")
        assert list(tmp_path.iterdir()) == []


class TestFailure:
    """Whatever stops the writing: one sentence, soon, what was there before still stands, and no shared memory is left."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, tmp_path: Path) -> Iterator[None]:
        shared_before = set(os.listdir("/dev/shm"))
        yield
        assert not [name for name in set(os.listdir("/dev/shm")) - shared_before if name.startswith("psm_")]
        assert not list(tmp_path.rglob("*.partial"))

    @pytest.fixture
    def split(self, make_shards: MakeShards) -> ShardSplit:
        split: ShardSplit = make_shards(train=(90, 70, 60, 10)).split("train")
        return split

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Callable[[int], Path]]:
        """Mounts a disk of so many bytes."""
        disk = tmp_path / "disk"
        disk.mkdir()

        def mount(size: int) -> Path:
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
            if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
                pytest.skip("needs the right to mount a small disk")
            return disk

        yield mount
        subprocess.run(["umount", "-l", str(disk)], capture_output=True, check=False)

    def test_too_little_space_is_seen_beforehand(self, split: ShardSplit, small_disk: Callable[[int], Path]) -> None:
        path = small_disk(2 << 20) / "train.beton"
        with pytest.raises(ShardError, match=rf"cannot write {path}: it takes 16782736 bytes and the disk has 2097152 left"):
            write_beton(split, path)
        assert list(path.parent.iterdir()) == []

    @pytest.mark.parametrize("left_bytes", [9 << 20, (16 << 20) + 4096])
    def test_a_disk_that_fills_up_meanwhile(self, split: ShardSplit, small_disk: Callable[[int], Path], left_bytes: int) -> None:
        # With 9 MiB left the page is cut short without an error, with 16 MiB it fits; either way the table behind it does not.
        path = small_disk(24 << 20) / "train.beton"

        def fill(count: int) -> None:
            if not (path.parent / "other").exists():
                (path.parent / "other").write_bytes(bytes((24 << 20) - left_bytes))

        path.write_bytes(b"the one before")
        with pytest.raises(ShardError, match=rf"cannot write {path}: {os.strerror(errno.ENOSPC)}; mend that"):
            write_beton(split, path, on_samples=fill)
        assert path.read_bytes() == b"the one before"
        assert sorted(file.name for file in path.parent.iterdir()) == ["other", "train.beton"]

    def test_a_disk_that_was_full_for_a_moment(self, tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
        # The first page is written while 12 MiB are left, 8 of them for the head; FFCV goes on as if all of it had arrived.
        jpeg = encode(noise(8, 8), "JPEG").ljust(67_000, b"\0")
        split = split_of([jpeg] * 230, tmp_path / "shards")
        path = small_disk(32 << 20) / "train.beton"
        steps: list[int] = []

        def fill_and_free(count: int) -> None:
            steps.append(count)
            if len(steps) == 1:
                (path.parent / "other").write_bytes(bytes(20 << 20))
            elif len(steps) == 2:
                (path.parent / "other").unlink()

        with pytest.raises(ShardError, match=rf"cannot write {path}: \d+ of 25171344 bytes arrived; make room"):
            write_beton(split, path, on_samples=fill_and_free)
        assert list(path.parent.iterdir()) == []

    def test_a_limit_on_file_sizes_between_two_pages(self, tmp_path: Path) -> None:
        split = split_of([encode(np.full((1600, 1000, 3), i, np.uint8), "PNG") for i in range(4)], tmp_path / "shards")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, hard))
        try:
            with pytest.raises(ShardError, match=rf"cannot write .*x\.beton: {os.strerror(errno.EFBIG)}"):
                write_beton(split, tmp_path / "x.beton")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_a_missing_folder(self, split: ShardSplit, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match=r"cannot write .*absent/train\.beton: No such file or directory"):
            write_beton(split, tmp_path / "absent" / "train.beton")

    def test_an_interrupt_passes_through(self, split: ShardSplit, tmp_path: Path) -> None:
        def interrupt(count: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_beton(split, tmp_path / "train.beton", on_samples=interrupt)

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_killed_process_leaves_only_the_partial_file(self, split: ShardSplit, tmp_path: Path) -> None:
        path = tmp_path / "train.beton"
        beton.require_ffcv()
        process = multiprocessing.get_context("fork").Process(
            target=write_beton, args=(split, path), kwargs={"on_samples": lambda count: os.kill(os.getpid(), signal.SIGKILL)}
        )
        process.start()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        assert [file.name for file in tmp_path.iterdir()] == ["train.beton.partial"]
        write_beton(split, path)
        assert [file.name for file in tmp_path.iterdir()] == ["train.beton"]
