"""Streamed shards give the batches that local ones give, from every kind of place, exactly resumable, within their memory."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.config import OrderConfig
from pipelines.format import ShardSet, open_shards
from pipelines.loaders import build_loader, choose_loader
from pipelines.types import ConfigError, ShardError
from tests.nginx import Nginx, running_nginx
from tests.object_store import S3, running_s3, use
from tests.pipelines.loaders.streams import (
    CONFIG,
    CPU,
    assert_same,
    buffer_of,
    collect,
    decoded_locally,
    instance_ids,
    order_of,
    source_of,
    stream_from,
)


@pytest.fixture
def served(shards: ShardSet) -> Iterator[Nginx]:
    with running_nginx(Path(shards.root)) as nginx:
        yield nginx


@pytest.fixture(scope="module")
def s3(shards: ShardSet) -> Iterator[S3]:
    with running_s3() as server, closing(server.client()) as client:
        for path in Path(shards.root).iterdir():
            client.upload_file(str(path), server.bucket, f"sets/one/{path.name}")
        yield server


@pytest.fixture(params=["http", "s3", "memory", "file", "path"])
def place(request: pytest.FixtureRequest, shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> Iterator[str | Path]:
    root = Path(shards.root)
    if request.param == "http":
        yield request.getfixturevalue("served").url
    elif request.param == "s3":
        server = request.getfixturevalue("s3")
        use(monkeypatch, server.environment)
        yield f"s3://{server.bucket}/sets/one"
    elif request.param == "memory":
        import fsspec

        memory = fsspec.filesystem("memory")
        for path in root.iterdir():
            memory.pipe_file(f"/streamed/{path.name}", path.read_bytes())
        yield "memory://streamed"
        memory.rm("/streamed", recursive=True)
    else:
        yield root.as_uri() if request.param == "file" else root


def test_every_place_streams_the_ids_and_pixels_of_local_decoding(place: str | Path, shards: ShardSet) -> None:
    for split in ("train", "test"):
        streamed = stream_from(place, split)
        expected = collect(decoded_locally(shards, streamed, split), epoch=1)
        assert_same(collect(streamed, epoch=1), expected)
    assert open_shards(place).fingerprint == shards.fingerprint


def test_each_sample_comes_once_an_epoch_the_last_partial_batch_too(served: Nginx) -> None:
    batches = collect(stream_from(served.url), epoch=2)
    assert sorted(instance_ids(batches)) == list(range(74))
    assert [batch.num_sources for batch in batches[-2:]] == [4, 2]


def test_each_shard_is_downloaded_once_an_epoch_and_by_one_rank_only(served: Nginx, shards: ShardSet) -> None:
    files = sorted(f"/{shard['file']}" for shard in shards.manifest["splits"]["train"]["shards"])
    collect(stream_from(served.url))
    assert sorted(request.path for request in served.requests() if request.path.endswith(".tar")) == files
    before = len(served.requests())
    order = OrderConfig(sampling="class-balanced", drop_last=True)
    for rank in range(2):
        collect(stream_from(served.url, rank=rank, world_size=2, num_shards=30, order=order))
    assert sorted(request.path for request in served.requests()[before:] if request.path.endswith(".tar")) == files


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_counts_every_sample_once(served: Nginx, world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        for batch in collect(stream_from(served.url, "test", rank=rank, world_size=world_size)):
            assert batch.mix is None
            seen += batch.ids_S.tolist()
    assert sorted(seen) == list(range(20))


def test_resuming_anywhere_continues_exactly_and_fetches_only_what_is_left(served: Nginx, shards: ShardSet) -> None:
    loader = stream_from(served.url)
    whole, num_steps = list(loader.epoch(1)), loader.num_steps
    order = order_of(loader)
    for start_step in (1, num_steps // 2, num_steps - 1, num_steps):
        before = len(served.requests())
        resumed = stream_from(served.url)
        assert_same(collect(resumed, 1, start_step), whole[start_step:])
        fetched = {request.path[1:] for request in served.requests()[before:] if request.path.endswith(".tar")}
        left = {int(shard) for batch in whole[start_step:] for shard in shards.split("train").shards_N[batch.ids_S]}
        assert fetched == {shards.manifest["splits"]["train"]["shards"][shard]["file"] for shard in left}
        assert len(left) == len({use.shard for use in order.uses(1, 0, start_step)})
    # Twice in one epoch, and on over its boundary.
    first = iter(loader.epoch(1, 2))
    next(first)
    assert_same([*loader.epoch(1, 5)], whole[5:])
    assert_same([*loader.epoch(2)], collect(stream_from(served.url), 2))
    loader.close()


def test_memory_of_shards_stays_within_the_buffer(served: Nginx, shards: ShardSet) -> None:
    loader = stream_from(served.url, num_shards=5)
    peaks = []
    for epoch in range(3):
        for _ in loader.epoch(epoch):
            fetcher = source_of(loader).fetcher
            assert fetcher is not None
            assert fetcher.held_bytes <= buffer_of(shards, 5)
        assert fetcher is not None
        peaks.append(fetcher.peak_bytes)
        assert fetcher.held_bytes == 0
    loader.close()
    assert max(peaks) <= buffer_of(shards, 5)
    assert min(peaks) > buffer_of(shards, 5) / 2  # while one window is used, the next one comes


def test_a_batch_of_more_shards_than_the_buffer_holds_is_served_all_the_same(
    served: Nginx, shards: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    streamed = stream_from(served.url, num_shards=2, batch_size=37)
    expected = collect(decoded_locally(shards, streamed))
    assert_same(collect(streamed), expected)
    assert "raise it" in caplog.text


def test_an_abandoned_epoch_leaves_no_thread_and_no_trace(served: Nginx) -> None:
    expected = collect(stream_from(served.url), epoch=1)
    threads = set(threading.enumerate())
    loader = stream_from(served.url)
    for start_step in (0, 7):
        next(iter(loader.epoch(0, start_step)))
    assert_same(list(loader.epoch(1)), expected)
    assert set(threading.enumerate()) <= threads
    next(iter(loader.epoch(2)))
    loader.close()
    assert set(threading.enumerate()) <= threads


def test_stock_webdataset_delivers_the_same_samples(served: Nginx, shards: ShardSet) -> None:
    """The same bytes by the same names: what streams here streams with the library too."""
    wds = pytest.importorskip("webdataset")
    if shutil.which("curl") is None:
        pytest.skip("webdataset reads HTTP through curl")
    loader = stream_from(served.url)
    split = source_of(loader)._split
    urls = [f"{served.url}/{shard['file']}" for shard in shards.manifest["splits"]["train"]["shards"]]
    theirs = {int(s["__key__"]): (s["jpg"], int(s["cls"])) for s in wds.WebDataset(urls, shardshuffle=False, empty_check=False)}
    assert len(theirs) == 74
    seen = set()
    for batch in loader.epoch(0):
        for sample_id, label in zip(batch.ids_S.tolist(), batch.labels_S.tolist(), strict=True):
            (image,) = split.encoded(np.array([sample_id]))
            assert theirs[sample_id] == (image.tobytes(), label)
            seen.add(sample_id)
    loader.close()
    assert len(seen) == 74


class TestWhatCannotWork:
    def test_other_loaders_say_what_to_take(self, served: Nginx) -> None:
        opened = open_shards(served.url)
        for loader in ("dali", "resident"):
            with pytest.raises(ConfigError, match=rf"loader '{loader}' needs a folder, and http://\S+ is a URL: .*--loader webdataset"):
                build_loader(opened, "train", replace(CONFIG, loader=loader), seed=0, device=CPU)
        with pytest.raises(ShardError, match=r"images of http://\S+\.tar are not on this machine: take --loader webdataset"):
            opened.split("train").encoded(np.array([3]))
        assert choose_loader(replace(CONFIG, loader="auto"), opened, CPU).name == "webdataset"

    def test_a_buffer_of_less_than_two_shards(self, shards: ShardSet) -> None:
        with pytest.raises(ConfigError, match=r"holds less than two shards of \d+ bytes.* add --set data.stream.buffer_bytes="):
            stream_from(shards, num_shards=1)

    def test_more_ranks_than_shards(self, shards: ShardSet) -> None:
        with pytest.raises(ConfigError, match="37 ranks cannot share the"):
            stream_from(shards, world_size=37, batch_size=37)

    def test_a_wrong_url(self, served: Nginx, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match=r"cannot read http://\S+/elsewhere/manifest\.json \(HTTP 404 Not Found\)"):
            open_shards(f"{served.url}/elsewhere")
        with pytest.raises(ShardError, match=r"cannot read http://no-such-host\.invalid/x/manifest\.json"):
            open_shards("http://no-such-host.invalid/x")
        started_s = time.monotonic()
        served.stop()
        with pytest.raises(ShardError, match=r"cannot read http://127\S+ \(Connection refused\): check the address"):
            open_shards(served.url)
        assert time.monotonic() - started_s < 5

    @pytest.mark.parametrize(("name", "change"), [("train.index.npy", b"\x00"), ("manifest.json", b"{")])
    def test_damaged_index_and_manifest(self, shards: ShardSet, tmp_path: Path, name: str, change: bytes) -> None:
        root = Path(shutil.copytree(shards.root, tmp_path / "damaged"))
        (root / name).write_bytes(change)
        with running_nginx(root) as nginx, pytest.raises(ShardError, match=rf"^{nginx.url}/{name} "):
            open_shards(nginx.url).split("train")


def test_synthetic_needs_no_image_of_a_remote_set(served: Nginx) -> None:
    config = replace(CONFIG, loader="synthetic")
    batches = collect(build_loader(open_shards(served.url), "train", config, seed=0, device=CPU))
    assert torch.cat([batch.labels_S for batch in batches]).bincount(minlength=4)[0] > 0
