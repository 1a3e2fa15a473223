"""Resampled streams: exact class counts, and DALI's own reader follows the virtual files sample for sample."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.config import OrderConfig
from pipelines.conversion import dali_index
from pipelines.conversion.dali_index import group_by_shard, write_virtual
from pipelines.conversion.resampling import RESAMPLINGS, Resampling, exact_counts, resampled_order
from pipelines.format import INDEX_DTYPE, ShardSet
from pipelines.order import SampleOrder, class_probabilities
from pipelines.types import ConfigError, ShardError

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any)
Tars = tuple[Path, list[str], np.ndarray, list[tuple[bytes, int]]]


def labels_of(counts: list[int]) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int64)


class TestOrder:
    @pytest.mark.parametrize("sampling", RESAMPLINGS)
    @given(counts=COUNTS, epoch_size=st.none() | st.integers(1, 700), seed=st.integers(0, 2**40), exponent=st.floats(0, 3))
    def test_class_counts_are_within_one_of_their_expectation(
        self, sampling: str, counts: list[int], epoch_size: int | None, seed: int, exponent: float
    ) -> None:
        labels = labels_of(counts)
        resampling = Resampling(sampling=sampling, exponent=exponent, beta=0.99, epoch_size=epoch_size, seed=seed)
        order = resampled_order(labels, len(counts), resampling)
        config = OrderConfig(sampling=sampling, resample_exponent=exponent, effective_number_beta=0.99)
        expected = len(order) * class_probabilities(np.array(counts), config, 0)
        drawn = exact_counts(order, labels, len(counts))
        assert len(order) == drawn.sum() == (epoch_size or len(labels))
        assert (np.abs(drawn - expected) <= 1 + 1e-6).all()
        assert (drawn[np.array(counts) == 0] == 0).all()
        uses = np.bincount(order, minlength=len(labels))
        for label in set(labels.tolist()):
            assert np.ptp(uses[labels == label]) <= 1

    def test_balanced_counts_of_a_divisible_size_are_equal(self) -> None:
        labels = labels_of([500, 107, 31, 8])
        order = resampled_order(labels, 4, Resampling(sampling="class-balanced", epoch_size=4000))
        assert exact_counts(order, labels, 4).tolist() == [1000] * 4

    def test_classes_are_mixed_all_along_the_stream(self) -> None:
        labels = labels_of([500, 107, 31, 8])
        order = resampled_order(labels, 4, Resampling(sampling="class-balanced", epoch_size=4000))
        tenths = np.array([exact_counts(part, labels, 4) for part in np.split(order, 10)])
        assert (np.abs(tenths - 100) < 5 * np.sqrt(100 * 0.75)).all()

    def test_the_seed_alone_decides_and_differs_from_a_run_with_the_same_seed(self) -> None:
        labels = labels_of([500, 107, 31, 8])
        first = resampled_order(labels, 4, Resampling(sampling="class-balanced", seed=5))
        np.testing.assert_array_equal(first, resampled_order(labels, 4, Resampling(sampling="class-balanced", seed=5)))
        assert (first != resampled_order(labels, 4, Resampling(sampling="class-balanced", seed=6))).mean() > 0.9
        run = SampleOrder(labels, 4, 64, 5, OrderConfig(sampling="class-balanced", draw="systematic"))
        assert (first != run.partner_epoch(0)).mean() > 0.9

    def test_golden_stream_is_the_same_on_every_machine_and_version(self) -> None:
        order = resampled_order(np.repeat([0, 1, 2], [5, 3, 2]), 3, Resampling(sampling="class-balanced", epoch_size=12))
        assert order.tolist() == [5, 0, 4, 9, 7, 6, 8, 9, 3, 8, 1, 6]


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"sampling": "class-balanced", "exponent": 0.3}, "class-balanced"),
            ({"sampling": "power", "exponent": 0.75}, "power-0.75"),
            ({"sampling": "power"}, "power-1"),
            ({"sampling": "effective-number", "beta": 0.9999}, "effective-number-0.9999"),
        ],
    )
    def test_name_holds_what_the_sampling_reads(self, options: dict[str, object], name: str) -> None:
        assert Resampling(**options).name == name  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"sampling": "progressive"}, "unknown resampling 'progressive'; known: class-balanced, "),
            ({"sampling": "power", "exponent": float("nan")}, r"exponent of a resampling must lie in \[0, 10\], not nan"),
            ({"sampling": "power", "exponent": -1.0}, r"exponent of a resampling must lie in \[0, 10\], not -1"),
            ({"sampling": "effective-number", "beta": 1.0}, r"beta must lie in \[0, 1\), not 1.0"),
            ({"sampling": "instance", "epoch_size": 0}, "epoch_size must lie in 1…1,073,741,824, not 0"),
        ],
    )
    def test_impossible_options_are_one_sentence(self, options: dict[str, object], sentence: str) -> None:
        with pytest.raises(ConfigError, match=sentence):
            Resampling(**options)  # type: ignore[arg-type]

    def test_an_empty_split_is_one_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="stream 'instance': the split has no samples"):
            write_virtual(tmp_path, "val", np.zeros(0, INDEX_DTYPE), [], Resampling(sampling="instance"), 3)
        assert list(tmp_path.iterdir()) == []


@given(seed=st.integers(0, 1000), num_shards=st.integers(1, 900), length=st.integers(1, 3000))
def test_grouping_keeps_every_draw_and_few_runs(seed: int, num_shards: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    shards = rng.integers(0, num_shards, 400)
    order = rng.integers(0, 400, length)
    grouped, starts = group_by_shard(order, shards, num_shards)
    assert sorted(grouped.tolist()) == sorted(order.tolist())
    assert len(starts) <= max(dali_index.MAX_PATHS, num_shards)
    assert starts[0] == 0
    assert all(len(set(shards[run].tolist())) == 1 for run in np.split(grouped, starts[1:]))
    if num_shards == 1:
        np.testing.assert_array_equal(grouped, order)


def write_tars(folder: Path, num_shards: int, per_shard: int, num_classes: int) -> Tars:
    """Tars of JPEG and PNG in turns, made by `tarfile` alone: folder, file names, index and (image, label) per sample."""
    rng = np.random.default_rng(1)
    files, records, samples = [], [], []
    for shard in range(num_shards):
        files.append(f"train-{shard:06d}.tar")
        with tarfile.open(folder / files[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample_id in range(shard * per_shard, (shard + 1) * per_shard):
                size = int(rng.integers(8, 40))
                buffer = io.BytesIO()
                extension = "png" if sample_id % 3 == 0 else "jpg"
                pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(buffer, "PNG" if extension == "png" else "JPEG")
                label = int(num_classes * rng.random() ** 3)
                for name, content in ((extension, buffer.getvalue()), ("cls", str(label).encode())):
                    header = tarfile.TarInfo(f"{sample_id:08d}.{name}")
                    header.size = len(content)
                    if name == extension:
                        records.append((shard, len(content), tar.offset + 512, label, size, size))
                    tar.addfile(header, io.BytesIO(content))
                samples.append((buffer.getvalue(), label))
    return folder, files, np.array(records, INDEX_DTYPE), samples


def dali_reads(folder: Path, listing: str, ext: list[str] | None = None) -> list[tuple[bytes, int]]:
    """Everything that DALI's stock reader yields in one pass."""
    from nvidia.dali import Pipeline, fn

    arguments = json.loads((folder / listing).read_text())
    paths, index_paths = ([str(folder / path) for path in arguments[key]] for key in ("paths", "index_paths"))
    size = arguments["num_samples"]
    pipeline = Pipeline(batch_size=size, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        ext = ext or arguments["ext"]
        reader = fn.readers.webdataset(paths=paths, index_paths=index_paths, ext=ext, missing_component_behavior="error", name="reader")
        pipeline.set_outputs(*reader)
    pipeline.build()
    assert pipeline.epoch_size("reader") == size
    images, labels = pipeline.run()
    return [(images.at(i).tobytes(), int(labels.at(i).tobytes())) for i in range(size)]


class TestVirtual:
    @pytest.mark.parametrize(("num_shards", "max_paths"), [(1, 512), (5, 4), (5, 21), (5, 512)], ids=["one tar", "M=1", "M=4", "M=102"])
    def test_dali_yields_exactly_the_order_file(
        self, tmp_path: Path, num_shards: int, max_paths: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dali_index, "MAX_PATHS", max_paths)
        folder, files, index, samples = write_tars(tmp_path, num_shards, 60 // num_shards, num_classes=120)
        resampling = Resampling(sampling="class-balanced", epoch_size=333, seed=2)
        entry = write_virtual(folder, "train", index, files, resampling, 120)
        order = np.load(folder / entry["order"]["file"])
        assert (order.dtype, order.shape) == (np.dtype("<u4"), (333,))
        assert len(set(order.tolist())) < 333  # repeats are part of the test
        assert dali_reads(folder, entry["dali"]["file"]) == [samples[i] for i in order]
        assert entry["dali"]["num_paths"] <= max(max_paths, num_shards)
        labels = index["label"].astype(np.int64)
        drawn = resampled_order(labels, 120, resampling)
        assert sorted(order.tolist()) == sorted(drawn.tolist())
        assert entry["class_counts"] == exact_counts(drawn, labels, 120).tolist()

    @pytest.mark.parametrize("extension", ["jpg", "png"])
    def test_dali_follows_a_stream_over_written_shards(self, make_shards: Callable[..., ShardSet], tmp_path: Path, extension: str) -> None:
        shards = make_shards(train=(60, 20, 9, 5), size=None, extension=extension, shard_bytes=48 << 10)
        for path in shards.root.glob("train*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        stored = shards.manifest["splits"]["train"]
        index = np.load(tmp_path / stored["index"]["file"])
        files = [shard["file"] for shard in stored["shards"]]
        assert len(files) > 1
        entry = write_virtual(tmp_path, "train", index, files, Resampling(sampling="square-root"), 4)
        order = np.load(tmp_path / entry["order"]["file"]).astype(np.int64)
        split = shards.split("train")
        expected = [(image.tobytes(), int(split.labels_N[i])) for i, image in zip(order, split.encoded(order), strict=True)]
        # Where a split holds one kind of image, the usual way to name it does as well.
        assert dali_reads(tmp_path, entry["dali"]["file"], [extension, "cls"]) == expected

    def test_index_lines_are_those_of_nvidias_tool(self, tmp_path: Path) -> None:
        wds2idx = pytest.importorskip("wds2idx")
        folder, files, index, _ = write_tars(tmp_path, 1, 40, num_classes=1200)
        with wds2idx.IndexCreator(str(folder / files[0]), str(tmp_path / "tool.idx"), verbose=False) as creator:
            creator.create_index()
        png_N = np.arange(40) % 3 == 0
        assert dali_index.index_text(index, np.arange(40), png_N) == (tmp_path / "tool.idx").read_bytes()

    def test_manifest_entry_describes_the_files(self, tmp_path: Path) -> None:
        folder, files, index, _ = write_tars(tmp_path, 3, 10, num_classes=3)
        entry = write_virtual(folder, "train", index, files, Resampling(sampling="power", exponent=0.5, seed=7), 3)
        assert json.loads(json.dumps(entry)) == entry
        assert {key: entry[key] for key in ("name", "sampling", "exponent", "seed", "epoch_size", "materialised")} == {
            "name": "power-0.5",
            "sampling": "power",
            "exponent": 0.5,
            "seed": 7,
            "epoch_size": 30,
            "materialised": False,
        }
        assert "beta" not in entry
        listing = json.loads((folder / "train.power-0.5.dali.json").read_text())
        assert entry["dali"]["num_paths"] == len(listing["paths"]) == len(listing["index_paths"])
        digests = [(path, hashlib.sha256((folder / path).read_bytes()).hexdigest()) for path in listing["index_paths"]]
        assert digests == list(zip(listing["index_paths"], listing["index_sha256"], strict=True))
        for part in ("order", "dali"):
            assert hashlib.sha256((folder / entry[part]["file"]).read_bytes()).hexdigest() == entry[part]["sha256"]

    def test_known_image_kinds_spare_the_look_into_the_tars_and_give_the_same_files(self, tmp_path: Path) -> None:
        folder, files, index, _ = write_tars(tmp_path, 2, 10, num_classes=3)
        looked = write_virtual(folder, "train", index, files, Resampling(sampling="class-balanced"), 3)
        for file in files:
            (folder / file).unlink()
        told = write_virtual(folder, "train", index, files, Resampling(sampling="class-balanced"), 3, np.arange(20) % 3 == 0)
        assert told == looked

    def test_writing_again_replaces_the_stream_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        folder, files, index, samples = write_tars(tmp_path, 2, 10, num_classes=3)
        stream = {"train.class-balanced.order.npy", "train.class-balanced.dali.json", "train.class-balanced.dali"}
        for epoch_size in (200, 15):
            entry = write_virtual(folder, "train", index, files, Resampling(sampling="class-balanced", epoch_size=epoch_size), 3)
            assert {path.name for path in folder.iterdir()} == {*files, *stream}
        assert len(list((folder / "train.class-balanced.dali").iterdir())) == entry["dali"]["num_paths"]
        assert dali_reads(folder, entry["dali"]["file"]) == [samples[i] for i in np.load(folder / entry["order"]["file"])]

    def test_a_missing_or_short_tar_is_named(self, tmp_path: Path) -> None:
        folder, files, index, _ = write_tars(tmp_path, 2, 10, num_classes=3)
        os.truncate(folder / files[1], 1024)
        with pytest.raises(ShardError, match=r"cannot read the images of .*train-000001\.tar"):
            write_virtual(folder, "train", index, files, Resampling(sampling="instance"), 3)
        (folder / files[0]).unlink()
        with pytest.raises(ShardError, match=r"cannot read the images of .*train-000000\.tar"):
            write_virtual(folder, "train", index, files, Resampling(sampling="instance"), 3)
        assert [path.name for path in folder.iterdir()] == [files[1]]

    def test_an_unwritable_folder_is_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        index = np.zeros(5, INDEX_DTYPE)
        with pytest.raises(ShardError, match=r"cannot write the resampled stream 'instance' to .*file"):
            write_virtual(tmp_path / "file", "train", index, ["a.tar"], Resampling(sampling="instance"), 3, np.zeros(5, np.bool_))
