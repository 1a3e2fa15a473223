"""Storage rows read the right bytes, from a page cache that is really empty or say that it was not."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bce3s.config import ModelConfig, TrainConfig
from bce3s.throughput.page_cache import drop, resident_share
from bce3s.throughput.storage import EncodedReader, storage_rows, warm_ids
from bce3s.throughput.timing import Budget
from bce3s.throughput.workload import Workload
from pipelines.config import DataConfig, StreamConfig
from pipelines.format import ShardSet, open_shards

CONFIG = TrainConfig(dataset="cifar10-lt", device="cpu", data=DataConfig(batch_size=16), model=ModelConfig(arch="resnet20-cifar"))
QUICK = Budget(repeats=5, seconds=0.005)
SHARED_MEMORY = Path("/dev/shm")


def copy_shards(shards: ShardSet, folder: Path) -> ShardSet:
    """Shards that no other test has mapped."""
    return open_shards(Path(shutil.copytree(shards.root, folder / "shards")))


def test_pages_are_seen_to_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    assert resident_share([path]) == 1.0
    drop([path])
    if resident_share([path]) == 1.0:
        pytest.skip(f"the file system of {tmp_path} keeps its pages in memory")
    assert resident_share([path]) == 0.0
    path.read_bytes()
    assert resident_share([path]) == 1.0


def test_the_reader_reads_every_encoded_image_once_in_order(make_shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    split = make_shards().split("train")
    ids_N = np.random.default_rng(0).permutation(len(split)).astype(np.int64)
    found: dict[tuple[str, int], bytes] = {}
    real = os.preadv
    lock = threading.Lock()

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        with lock:
            count = real(descriptor, buffers, offset)
            found[os.readlink(f"/proc/self/fd/{descriptor}"), offset] = bytes(buffers[0])
            return count

    monkeypatch.setattr(os, "preadv", read)
    reader = EncodedReader(split, ids_N)
    assert reader.read_some() == len(split)
    reader.close()
    expected = {
        (str(split.paths[int(split.shards_N[i])]), int(split.offsets_N[i])): split.encoded(np.array([i]))[0].tobytes() for i in ids_N
    }
    assert found == expected


def test_cold_and_warm_rows_are_measured_where_pages_can_be_dropped(make_shards: Any, tmp_path: Path) -> None:
    workload = Workload(CONFIG, copy_shards(make_shards(), tmp_path))
    cold, warm = storage_rows(workload, QUICK)
    if not cold.rates:
        assert "stay in memory" in cold.reason
        pytest.skip(f"the file system of {tmp_path} keeps its pages in memory")
    assert len(cold.rates) == len(warm.rates) == 5
    mean_bytes = float(workload.split.sizes_N.mean())
    assert warm.details["gb_per_s"] == pytest.approx(warm.median * mean_bytes / 1e9)
    assert resident_share(workload.split.paths) > 0.5  # what follows finds the images in memory


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="needs a tmpfs at /dev/shm")
def test_a_file_system_that_keeps_its_pages_is_not_called_cold(make_shards: Any) -> None:
    folder = SHARED_MEMORY / f"bce3s-test-{os.getpid()}"
    folder.mkdir()
    try:
        cold, warm = storage_rows(Workload(CONFIG, copy_shards(make_shards(), folder)), QUICK)
    finally:
        shutil.rmtree(folder)
    assert cold.to_dict()["text"].startswith("not measured: 100% of the pages stay in memory after posix_fadvise, as on tmpfs")
    assert warm.rates


def test_a_shard_cut_short_is_a_row_not_measured(make_shards: Any, tmp_path: Path) -> None:
    shards = copy_shards(make_shards(), tmp_path)
    workload = Workload(CONFIG, shards)
    os.truncate(workload.split.paths[0], 600)
    rows = list(storage_rows(workload, QUICK))
    assert all("was cut short while it was read" in row.reason for row in rows)


@pytest.mark.parametrize("loader", ["dali", "webdataset"])
def test_storage_rows_read_what_the_loader_draws_from_both_streams(make_shards: Any, loader: str) -> None:
    # A buffer of fewer shards than there are makes webdataset's order one of its own.
    shards = make_shards()
    buffer_bytes = 2 * int(shards.split("train").shard_bytes.max())
    data = replace(CONFIG.data, loader=loader, num_threads=1, stream=StreamConfig(buffer_bytes=buffer_bytes))
    workload = Workload(replace(CONFIG, data=data), shards)
    opened = workload.loader()
    drawn = [batch.ids_S for batch in opened.epoch(workload.first_epoch)]
    opened.close()
    assert workload.epoch_ids().tolist() == np.concatenate(drawn).tolist()
    assert len(workload.epoch_ids()) == 2 * len(workload.split)


def test_the_start_of_the_order_is_warmed_as_far_as_memory_goes(make_shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload(CONFIG, make_shards())
    order = workload.epoch_ids()
    assert warm_ids(workload).tolist() == order.tolist()  # much less than half of any memory
    count = next(i for i in range(2, len(order)) if order[i] in order[:i])  # an image drawn again is in memory already
    held_bytes = int(workload.split.sizes_N[order[:count]].sum())
    monkeypatch.setattr("bce3s.throughput.storage.free_host_bytes", lambda: 2 * held_bytes)
    warm = warm_ids(workload)
    assert warm[: count + 1].tolist() == order[: count + 1].tolist()
    assert int(workload.split.sizes_N[np.unique(warm)].sum()) == held_bytes


def test_every_image_of_the_epoch_is_in_memory_for_the_later_rows(
    make_shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short the samples are: a warm row of a few images must not leave the others on the disk."""
    workload = Workload(CONFIG, copy_shards(make_shards(), tmp_path))
    drop(workload.split.paths)
    if resident_share(workload.split.paths) > 0:
        pytest.skip(f"the file system of {tmp_path} keeps its pages in memory")
    found: set[tuple[str, int]] = set()
    real = os.preadv

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        found.add((os.readlink(f"/proc/self/fd/{descriptor}"), offset))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr("bce3s.throughput.storage._READS_A_TURN", 1)
    rows = storage_rows(workload, Budget(repeats=5, seconds=1e-6))  # a sample is 16 images
    next(rows)
    monkeypatch.setattr(os, "preadv", read)
    assert next(rows).rates
    assert len(found) == len(workload.split)
    assert resident_share(workload.split.paths) > 0.9
