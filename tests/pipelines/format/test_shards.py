"""Shards are what stock readers expect, byte-identical for the same input, all or nothing, and refuse what they cannot vouch for."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.conversion import WriteOptions, write_shards
from pipelines.format import FORMAT_VERSION, ShardSet, open_shards
from pipelines.types import SPLITS, DatasetError, EncodedSample, OpenDataset, ShardError, Split

COUNTS = [7, 4, 2]


def image_bytes(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **save: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **save)
    return buffer.getvalue()


def dataset_of(samples: list[tuple[bytes, int]]) -> OpenDataset:
    """A data set whose three splits hold the same samples."""

    def split(name: str) -> Split:
        labels = np.array([label for _, label in samples], np.int64)
        return Split(
            labels_N=labels,
            sources=[f"{name}/image-{i}.jpg" for i in range(len(labels))],
            read=lambda i: EncodedSample(encoded=samples[i][0], extension="jpg", label=int(labels[i]), source=f"{name}/image-{i}.jpg"),
        )

    return OpenDataset(name="folder", class_names=("ant", "bee", "cat"), splits={name: split(name) for name in SPLITS})


def good_samples() -> list[tuple[bytes, int]]:
    return [(image_bytes(size=(40 + i, 30 + i)), int(label)) for i, label in enumerate(np.repeat([0, 1, 2], COUNTS))]


def write(samples: list[tuple[bytes, int]], out: Path, **options: Any) -> ShardSet:
    orders = {name: np.arange(len(samples))[::-1].copy() for name in SPLITS}
    write_shards(dataset_of(samples), orders, out, WriteOptions(**{"shard_bytes": 6000, **options}))
    return open_shards(out)


def file_digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


class TestRoundTrip:
    def test_reader_returns_the_bytes_labels_and_sizes_that_were_written(self, tmp_path: Path) -> None:
        samples = good_samples()
        split = write(samples, tmp_path / "out").split("train")
        assert len(split) == len(samples)
        for sample_id, (encoded, label) in enumerate(reversed(samples)):
            assert split.encoded(np.array([sample_id]))[0].tobytes() == encoded
            assert split.labels_N[sample_id] == label
            with Image.open(io.BytesIO(encoded)) as image:
                assert (split.widths_N[sample_id], split.heights_N[sample_id]) == image.size

    def test_manifest_records_counts_names_and_checksums(self, tmp_path: Path) -> None:
        shards = write(good_samples(), tmp_path / "out")
        assert shards.class_counts("train").tolist() == COUNTS
        assert shards.class_names == ("ant", "bee", "cat")
        entry = shards.manifest["splits"]["train"]
        assert len(entry["shards"]) > 1
        digests = file_digests(shards.root)
        for file in [*entry["shards"], entry["index"]]:
            assert digests[file["file"]] == file["sha256"]

    def test_same_input_gives_byte_identical_output(self, tmp_path: Path) -> None:
        for name, threads in (("one", 1), ("two", 4)):
            write(good_samples(), tmp_path / name, num_threads=threads)
        assert file_digests(tmp_path / "one") == file_digests(tmp_path / "two")

    def test_an_empty_split_is_written_and_read(self, tmp_path: Path) -> None:
        dataset = dataset_of(good_samples())
        dataset = replace(dataset, splits={**dataset.splits, "val": replace(dataset.splits["val"], labels_N=np.zeros(0, int), sources=[])})
        orders = {name: np.arange(len(split.labels_N)) for name, split in dataset.splits.items()}
        write_shards(dataset, orders, tmp_path / "out", WriteOptions())
        assert len(open_shards(tmp_path / "out").split("val")) == 0


class TestStockReaders:
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
    def test_webdataset_reads_every_sample(self, tmp_path: Path) -> None:
        import webdataset

        samples = good_samples()
        shards = write(samples, tmp_path / "out")
        urls = [str(tmp_path / "out" / shard["file"]) for shard in shards.manifest["splits"]["train"]["shards"]]
        read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        assert [sample["__key__"] for sample in read] == [f"{i:08d}" for i in range(len(samples))]
        assert [(sample["jpg"], int(sample["cls"])) for sample in read] == list(reversed(samples))
        gc.collect()  # webdataset leaves its files to the collector; their warnings belong to this test, which ignores them

    def test_dali_webdataset_reader_reads_every_sample(self, tmp_path: Path) -> None:
        from nvidia.dali import Pipeline, fn

        samples = good_samples()
        shards = write(samples, tmp_path / "out")
        paths = [str(tmp_path / "out" / shard["file"]) for shard in shards.manifest["splits"]["train"]["shards"]]
        pipeline = Pipeline(batch_size=len(samples), num_threads=1, device_id=None)
        with pipeline:
            pipeline.set_outputs(*fn.readers.webdataset(paths=paths, ext=["jpg", "cls"], missing_component_behavior="error"))
        pipeline.build()
        images, labels = pipeline.run()
        read = [(images.at(i).tobytes(), int(labels.at(i).tobytes())) for i in range(len(samples))]
        assert read == list(reversed(samples))

    def test_tar_command_layout_is_plain_ustar(self, tmp_path: Path) -> None:
        write(good_samples(), tmp_path / "out")
        with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
            members = tar.getmembers()
        assert [member.name for member in members[:4]] == ["00000000.jpg", "00000000.cls", "00000001.jpg", "00000001.cls"]
        assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}


class TestImages:
    @pytest.mark.parametrize(
        ("encoded", "extension"),
        [
            (image_bytes("JPEG", "RGB"), "jpg"),
            (image_bytes("JPEG", "L"), "jpg"),
            (image_bytes("PNG", "RGB"), "png"),
        ],
    )
    def test_readable_rgb_and_grey_keep_their_bytes(self, tmp_path: Path, encoded: bytes, extension: str) -> None:
        shards = write([(encoded, 0)], tmp_path / "out")
        assert shards.split("train").encoded(np.array([0]))[0].tobytes() == encoded
        assert shards.manifest["num_reencoded"] == 0
        with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
            assert tar.getnames()[0] == f"00000000.{extension}"

    @pytest.mark.parametrize(
        "encoded",
        [
            image_bytes("JPEG", "CMYK"),
            image_bytes("JPEG", "RGB", progressive=True),
            image_bytes("PNG", "P"),
            image_bytes("PNG", "RGBA"),
            image_bytes("PNG", "I;16"),
            image_bytes("PNG", "1"),
            image_bytes("WEBP"),
            image_bytes("GIF", "P"),
            image_bytes("BMP"),
        ],
    )
    def test_other_images_become_upright_rgb_jpeg(self, tmp_path: Path, encoded: bytes) -> None:
        shards = write([(encoded, 0)], tmp_path / "out")
        with Image.open(io.BytesIO(shards.split("train").encoded(np.array([0]))[0].tobytes())) as stored:
            assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", (40, 30))
        assert shards.manifest["num_reencoded"] == 3

    def test_exif_rotation_is_baked_in(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        split = write([(image_bytes(exif=exif), 0)], tmp_path / "out").split("train")
        assert (split.heights_N[0], split.widths_N[0]) == (40, 30)

    @pytest.mark.parametrize("orientation", [0, 1, 99])
    def test_exif_without_a_rotation_keeps_the_bytes(self, tmp_path: Path, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        encoded = image_bytes(exif=exif)
        assert write([(encoded, 0)], tmp_path / "out").split("train").encoded(np.array([0]))[0].tobytes() == encoded

    @pytest.mark.parametrize(
        "broken",
        [b"", b"not an image", image_bytes()[:900], image_bytes("PNG")[:900], b"\xff\xd8\xff\xe0" + b"\0" * 50],
        ids=["empty", "text", "truncated jpeg", "truncated png", "zeros"],
    )
    def test_undecodable_image_is_named_or_skipped_with_a_count(self, tmp_path: Path, broken: bytes) -> None:
        samples = [*good_samples(), (broken, 1)]
        with pytest.raises(DatasetError, match=r"(train|val|test)/image-13\.jpg is not a readable image: .*--on-error skip"):
            write(samples, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        shards = write(samples, tmp_path / "out", on_error="skip", resume=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert shards.num_samples("train") == 13
        assert shards.manifest["num_skipped"] == 3

    def test_a_decompression_bomb_is_refused_without_decoding(self, tmp_path: Path) -> None:
        bomb = io.BytesIO()
        Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
        with pytest.raises(DatasetError, match=r"image-0\.jpg is not a readable image: .*decompression bomb"):
            write([(bomb.getvalue(), 0)], tmp_path / "out")


class TestAllOrNothing:
    def test_existing_output_is_refused_then_replaced(self, tmp_path: Path) -> None:
        write(good_samples(), tmp_path / "out")
        with pytest.raises(ShardError, match="exists already; add --overwrite"):
            write(good_samples(), tmp_path / "out")
        assert write(good_samples()[:5], tmp_path / "out", overwrite=True).num_samples("train") == 5
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("kind", ["photographs", "a file"])
    def test_overwrite_removes_nothing_but_shards(self, tmp_path: Path, kind: str) -> None:
        out = tmp_path / "precious"
        if kind == "a file":
            out.write_text("notes")
        else:
            out.mkdir()
            (out / "holiday.jpg").write_bytes(image_bytes())
        with pytest.raises(ShardError, match="is not a shard folder, so --overwrite does not remove it"):
            write(good_samples(), out, overwrite=True)
        assert out.read_text() == "notes" if kind == "a file" else (out / "holiday.jpg").exists()

    def test_nothing_readable_writes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="no readable training image"):
            write([(b"broken", 0)], tmp_path / "out", on_error="skip")
        assert list(tmp_path.iterdir()) == []

    def test_what_a_killed_run_left_is_cleared(self, tmp_path: Path) -> None:
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "train-000000.tar").write_bytes(b"half")
        write(good_samples(), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_failing_overwrite_keeps_the_old_shards(self, tmp_path: Path) -> None:
        write(good_samples(), tmp_path / "out")
        before = file_digests(tmp_path / "out")
        with pytest.raises(DatasetError):
            write([(b"broken", 0)], tmp_path / "out", overwrite=True)
        assert file_digests(tmp_path / "out") == before

    def test_unwritable_folder_is_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ShardError, match="cannot write shards to"):
            write(good_samples(), tmp_path / "file" / "out")


class TestDamage:
    @pytest.fixture
    def shards(self, tmp_path: Path) -> Path:
        write(good_samples(), tmp_path / "out")
        return tmp_path / "out"

    def edit_manifest(self, root: Path, **changes: Any) -> None:
        manifest = json.loads((root / "manifest.json").read_text())
        (root / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    def test_missing_folder_names_the_command(self, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match=r"no shards at .*absent.*tools/make_shards\.py"):
            open_shards(tmp_path / "absent")

    def test_folder_without_manifest_is_not_finished(self, shards: Path) -> None:
        (shards / "manifest.json").unlink()
        with pytest.raises(ShardError, match="not a finished shard folder"):
            open_shards(shards)

    def test_labels_beyond_the_classes_are_refused(self, shards: Path) -> None:
        index = np.load(shards / "train.index.npy")
        index["label"][3] = 3
        np.save(shards / "train.index.npy", index)
        with pytest.raises(ShardError, match="names labels or shards that the manifest does not have"):
            open_shards(shards).split("train")

    def test_another_version_names_both(self, shards: Path) -> None:
        self.edit_manifest(shards, version=99)
        with pytest.raises(ShardError, match=f"format version 99, this program reads version {FORMAT_VERSION}"):
            open_shards(shards)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}', "\0\0"])
    def test_damaged_manifest_is_one_sentence(self, shards: Path, content: str) -> None:
        (shards / "manifest.json").write_text(content)
        with pytest.raises(ShardError, match=r"manifest\.json"):
            open_shards(shards)

    def test_manifest_without_splits_is_one_sentence(self, shards: Path) -> None:
        self.edit_manifest(shards, splits={"train": {}})
        with pytest.raises(ShardError, match=r"lacks splits\.train\.num_samples, .*splits\.test\.index"):
            open_shards(shards)

    def test_truncated_shard_is_named(self, shards: Path) -> None:
        path = shards / "train-000001.tar"
        path.write_bytes(path.read_bytes()[:-512])
        with pytest.raises(ShardError, match=r"train-000001\.tar has \d+ bytes, the manifest says \d+"):
            open_shards(shards).split("train")

    def test_missing_shard_is_named(self, shards: Path) -> None:
        (shards / "train-000001.tar").unlink()
        with pytest.raises(ShardError, match=r"cannot open shard .*train-000001\.tar"):
            open_shards(shards).split("train")

    @pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"garbage" * 10])
    def test_damaged_index_is_named(self, shards: Path, content: bytes) -> None:
        (shards / "train.index.npy").write_bytes(content)
        with pytest.raises(ShardError, match=r"train\.index\.npy"):
            open_shards(shards).split("train")

    def test_index_of_another_split_does_not_fit(self, shards: Path, tmp_path: Path) -> None:
        other = write(good_samples()[:3], tmp_path / "other")
        shutil.copy(other.root / "train.index.npy", shards / "train.index.npy")
        with pytest.raises(ShardError, match="does not fit the manifest"):
            open_shards(shards).split("train")
