"""Readers take nothing but whole files of their folder, hold none of them open, and name what is wrong."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.format import INDEX_DTYPE, open_shards
from pipelines.format.repair import repair_indexes
from pipelines.types import ShardError
from tests.pipelines.format.folders import holds_up, read_json, write_folder, write_json

_MAX_BYTES = 8 << 20  # far above what these small folders need, far below what their damage asks for


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("good") / "shards")


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "shards"))


def npy(array: Any, **save: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **save)
    return buffer.getvalue()


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    padded = text.encode("latin1")
    length = len(padded).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + length + padded


def headers() -> dict[str, bytes]:
    descr = repr(INDEX_DTYPE.descr)
    records = bytes(18 * INDEX_DTYPE.itemsize)
    return {
        "huge shape": header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': (1000000000000,), }}\n") + records,
        "negative shape": header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': (-18,), }}\n") + records,
        "two axes": header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': (18, 1), }}\n") + records,
        "nested brackets": header("(" * 9000) + records,
        "code": header("__import__('os').system('true')\n") + records,
        "escape": header("{'descr': '\\d', 'fortran_order': False, 'shape': (18,), }\n") + records,
        "python 2": header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': (18L,), }}\n", b"\x02\x00") + records,
        "huge items": header("{'descr': '|V2000000000', 'fortran_order': False, 'shape': (18,), }\n") + records,
        "header beyond the end": b"\x93NUMPY\x01\x00\xff\xff{}",
        "version 3": b"\x93NUMPY\x03\x00\xff\xff\xff\xff",
        "zip": b"PK\x03\x04" + bytes(100),
        "pickle": pickle.dumps(list(range(100))),
        "objects": npy(np.array([None] * 18, object), allow_pickle=True),
        "floats": npy(np.zeros(18)),
        "big-endian": npy(np.zeros(18, INDEX_DTYPE.newbyteorder(">"))),
        "zeros": npy(np.zeros(18, INDEX_DTYPE)),
        "none": npy(np.zeros(0, INDEX_DTYPE)),
    }


class TestManifestsAndIndexes:
    @pytest.mark.parametrize(
        "name", ["../secret.tar", "/etc/passwd", "sub/x.tar", "..", "", "a\0b", ".hidden", "x" * 300, "ü.tar", "a b", "a\n"]
    )
    @pytest.mark.parametrize("key", ["shards", "index"])
    def test_file_names_are_plain(self, copied: Path, key: str, name: str) -> None:
        (copied.parent / "secret.tar").write_bytes((copied / "train-000000.tar").read_bytes())
        manifest = read_json(copied)
        entry = manifest["splits"]["train"][key]
        (entry[0] if key == "shards" else entry)["file"] = name
        write_json(copied, manifest)
        with pytest.raises(ShardError, match=r"manifest\.json has a splits\.train\..*file that is not a plain name"):
            open_shards(copied)
        assert not holds_up(copied)

    @pytest.mark.parametrize("split", ["train", "val"])
    @pytest.mark.parametrize("kind", headers())
    def test_other_files_are_refused_without_memory_for_what_they_promise(self, copied: Path, split: str, kind: str) -> None:
        (copied / f"{split}.index.npy").write_bytes(headers()[kind])
        peaks = []
        # Three times: a process in which hundreds of tests have run takes memory for itself now and then, a file asks for it each time.
        for _ in range(3):
            tracemalloc.start()
            try:
                assert holds_up(copied) == (kind == "none" and split == "val")
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
        assert min(peaks) < _MAX_BYTES

    @pytest.mark.parametrize(
        ("field", "value", "sentence"),
        [
            ("offset", 2**64 - 10, "places sample 5 outside its shard"),
            ("offset", 20_480, "places sample 5 outside its shard"),
            ("offset", 0, "places sample 5 outside its shard"),
            ("size", 2**32 - 1, "places sample 5 outside its shard"),
            ("size", 0, "holds images of 0 bytes or 0 pixels"),
            ("width", 0, "holds images of 0 bytes or 0 pixels"),
            ("label", -1, "names labels or shards that the manifest does not have"),
            ("shard", 4, "names labels or shards that the manifest does not have"),
            ("label", 1, "holds other class counts than the manifest"),
        ],
    )
    def test_records_that_lead_astray_are_named(self, copied: Path, field: str, value: int, sentence: str) -> None:
        index = np.load(copied / "train.index.npy")
        index[field][5] = value
        np.save(copied / "train.index.npy", index)
        with pytest.raises(ShardError, match=rf"train\.index\.npy {sentence}; run 'python tools/verify_shards\.py .* --repair-index'"):
            open_shards(copied).split("train")
        assert not holds_up(copied)


class TestFiles:
    def pipe(self, path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def folder(self, path: Path) -> None:
        path.unlink()
        path.mkdir()

    def device(self, path: Path) -> None:
        path.unlink()
        path.symlink_to("/dev/zero")

    def loop(self, path: Path) -> None:
        path.unlink()
        path.symlink_to(path.name)

    def dangling(self, path: Path) -> None:
        path.unlink()
        path.symlink_to("absent")

    @pytest.mark.parametrize("file", ["manifest.json", "train.index.npy", "train-000001.tar", "train.class-balanced.order.npy"])
    @pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "dangling"])
    def test_nothing_but_files_of_the_folder_is_read(self, copied: Path, file: str, kind: str) -> None:
        change: Callable[[Path], None] = getattr(self, kind)
        change(copied / file)
        assert holds_up(copied) == ("order" in file)
        if file == "train.index.npy":
            if kind == "folder":
                with pytest.raises(ShardError, match="cannot write to"):
                    repair_indexes(copied)
            else:
                assert len(repair_indexes(copied).done) == 1
                assert holds_up(copied)

    @pytest.mark.parametrize("store", ["store", "../another-disk"])
    def test_links_of_plain_names_are_followed(self, copied: Path, store: str) -> None:
        (copied / store).mkdir()
        for path in [*copied.glob("*.tar"), copied / "train.index.npy"]:
            path.rename(copied / store / path.name)
            path.symlink_to(f"{store}/{path.name}")
        assert holds_up(copied)
        (copied.parent / "link").symlink_to(copied)
        assert holds_up(copied.parent / "link")

    @pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
    def test_an_open_split_holds_no_file_open_and_unmaps_when_dropped(self, good: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        split = open_shards(good).split("train")
        image = split.encoded(np.array([0]))[0]
        assert len(os.listdir("/proc/self/fd")) == before
        assert f"{good}/train-000003.tar" in Path("/proc/self/maps").read_text()
        del split
        assert image[:2].tobytes() == b"\xff\xd8"  # a view keeps its tar
        assert f"{good}/train-000003.tar" not in Path("/proc/self/maps").read_text()
        del image
        assert f"{good}/train-000000.tar" not in Path("/proc/self/maps").read_text()

    def test_an_unknown_split_is_one_sentence(self, good: Path) -> None:
        for ask in (open_shards(good).split, open_shards(good).num_samples, open_shards(good).class_counts):
            with pytest.raises(ShardError, match="has no split 'dev'; it has train, val, test"):
                ask("dev")

    def test_a_sample_behind_a_gap_is_described_by_its_name_in_the_tar(self, good: Path) -> None:
        split = open_shards(good).split("train")
        assert split.describe(3) == f"sample 00000003 of {good}/train-000000.tar"
        assert split.describe(4) == f"sample 00000004 (00000005.png) of {good}/train-000001.tar"

    def test_half_a_million_records_open_in_a_moment(self, tmp_path: Path) -> None:
        num, num_shards = 437_513, 480
        index = np.zeros(num, INDEX_DTYPE)
        index["shard"], index["offset"], index["size"] = np.arange(num) * num_shards // num, 512, 100
        index["label"], index["height"], index["width"] = np.arange(num) % 8142, 500, 400
        np.save(tmp_path / "train.index.npy", index)
        np.save(tmp_path / "none.index.npy", index[:0])
        shards = []
        for number, count in enumerate(np.bincount(index["shard"]).tolist()):
            file = f"train-{number:06d}.tar"
            with (tmp_path / file).open("wb") as tar:
                tar.truncate(1 << 20)
            shards.append({"file": file, "num_samples": count, "shard_bytes": 1 << 20, "sha256": "0" * 64})
        counts = np.bincount(index["label"]).tolist()
        train = {"num_samples": num, "class_counts": counts, "shards": shards, "index": {"file": "train.index.npy", "sha256": "0" * 64}}
        empty = {"num_samples": 0, "class_counts": [0] * 8142, "shards": []}
        splits = {"train": train} | {
            name: {**empty, "index": {"file": f"{name}.index.npy", "sha256": "0" * 64}} for name in ("val", "test")
        }
        names = [str(k) for k in range(8142)]
        write_json(tmp_path, {"format": "bce3s-shards", "version": 1, "dataset": "x", "class_names": names, "splits": splits})
        spent_s = []
        for _ in range(3):
            start_s = time.perf_counter()
            open_shards(tmp_path).split("train")
            spent_s.append(time.perf_counter() - start_s)
        assert min(spent_s) < 1.0, spent_s  # 0.1 s on an idle machine; the bound is for one that is busy
