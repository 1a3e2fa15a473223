"""What servers do: cut connections, go away and come back, lose, shorten and change shards; a run goes on, or ends in one sentence."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pipelines.format import ShardSet, open_shards
from pipelines.loaders.shard_fetcher import LostShardError
from pipelines.types import ShardError
from tests.nginx import breaking_line, running_nginx
from tests.object_store import running_s3, stalling_line, use
from tests.pipelines.loaders.streams import (
    assert_same,
    collect,
    instance_ids,
    order_of,
    shard_names,
    shard_warnings,
    stream_from,
)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard-fetcher")]


class TestCutConnections:
    @pytest.mark.parametrize("after_bytes", [9000, 20_000])
    def test_a_connection_that_breaks_off_is_taken_up_where_it_stopped(
        self, shards: ShardSet, after_bytes: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = collect(stream_from(shards))
        with running_nginx(Path(shards.root)) as nginx, breaking_line(nginx.port, after_bytes) as (url, breaks):
            streamed = stream_from(nginx.url)
            vars(streamed)["_request"].shards.origin._location = url  # opened in peace, streamed over the line that breaks
            assert_same(collect(streamed), expected)
        entries = shards.manifest["splits"]["train"]["shards"]
        assert len(breaks) >= sum(entry["shard_bytes"] // after_bytes for entry in entries) > len(entries)
        # Each connection carries nearly `after_bytes` of new content (its headers take some): nothing is read twice.
        assert len(breaks) <= sum(entry["shard_bytes"] // (after_bytes - 600) for entry in entries)
        assert sum(start > 0 for start in breaks) >= len(breaks) - len(entries)
        assert not shard_warnings(caplog)

    def test_a_server_without_ranges_is_read_from_the_start(self, shards: ShardSet) -> None:
        expected = collect(stream_from(shards))
        with running_nginx(Path(shards.root), "max_ranges 0;") as nginx, breaking_line(nginx.port, 20_000, times=5) as (url, breaks):
            streamed = stream_from(nginx.url)
            vars(streamed)["_request"].shards.origin._location = url
            assert_same(collect(streamed), expected)
            assert {request.status for request in nginx.requests()} == {200}
        assert 5 <= len(breaks) <= 8  # lines that were open already when the fifth broke
        assert max(breaks) > 0


def restart_while_streaming(shards: ShardSet, gone_s: float, caplog: pytest.LogCaptureFixture) -> None:
    expected = collect(stream_from(shards, num_shards=6))
    with running_nginx(Path(shards.root), "limit_rate 30k;") as nginx:  # slow enough to be in the middle of a shard
        loader = stream_from(nginx.url, patience_s=gone_s + 10, num_shards=6)
        batches = iter(loader.epoch(0))
        found = [next(batches)]
        time.sleep(0.3)
        nginx.stop()
        back = threading.Timer(gone_s, nginx.start)
        back.start()
        found += list(batches)
        back.join()
        loader.close()
        assert any(request.start for request in nginx.requests())
    assert_same(found, expected)
    warnings = shard_warnings(caplog)
    assert len(warnings) == 1
    assert re.search(r"does not answer \(Connection (refused|reset by peer)\): trying again for", warnings[0])


class TestServerGone:
    def test_for_a_second(self, shards: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
        restart_while_streaming(shards, 1.0, caplog)

    @pytest.mark.slow
    def test_for_ten_seconds(self, shards: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
        restart_while_streaming(shards, 10.0, caplog)

    @pytest.mark.parametrize("on_error", ["stop", "skip"])
    def test_for_longer_than_patience(self, shards: ShardSet, on_error: str) -> None:
        """Also with "skip": nothing is left to go on with."""
        with running_nginx(Path(shards.root)) as nginx:
            loader = stream_from(nginx.url, patience_s=0.5, on_error=on_error)
            batches = iter(loader.epoch(0))
            next(batches)
            nginx.stop()
            started_s = time.monotonic()
            with pytest.raises(ShardError, match=r"refused; waited 0\.5 s|no shard of 'train'"):
                list(batches)
            assert time.monotonic() - started_s < 8
            loader.close()

    def test_an_epoch_abandoned_meanwhile_ends_its_threads_at_once(self, shards: ShardSet) -> None:
        with running_nginx(Path(shards.root)) as nginx:
            loader = stream_from(nginx.url, patience_s=60.0)
            next(iter(loader.epoch(0)))
            nginx.stop()
            time.sleep(1.6)  # in the middle of a pause of 1.6 s
            started_s = time.monotonic()
            loader.close()
            assert time.monotonic() - started_s < 1

    def test_a_server_that_answers_nothing_any_more_is_left_at_once(self, shards: ShardSet) -> None:
        with running_nginx(Path(shards.root)) as nginx, stalling_line(nginx.url, 700) as (url, stalled):
            loader = stream_from(nginx.url, patience_s=60.0, num_shards=6)
            vars(loader)["_request"].shards.origin._location = url
            next(iter(loader.epoch(0)))
            assert stalled.wait(5)
            time.sleep(0.2)
            started_s = time.monotonic()
            loader.close()
            assert time.monotonic() - started_s < 1


class TestLostShards:
    def test_stop_names_the_url_and_what_to_do(self, shards: ShardSet, folder: Path) -> None:
        with running_nginx(folder) as nginx:
            opened = open_shards(nginx.url)
            (folder / shard_names(shards)[2]).unlink()
            with pytest.raises(ShardError, match=rf"cannot read {nginx.url}/train-000002\.tar \(HTTP 404 Not Found\): .*on_error=skip"):
                collect(stream_from(opened))
            (folder / "test-000000.tar").unlink()
            with pytest.raises(LostShardError) as found:
                collect(stream_from(opened, "test", on_error="skip"))
            assert "skip" not in str(found.value)

    @pytest.mark.parametrize("lost", [(2,), (0, 1, 5)])
    def test_skip_trains_on_with_others_of_the_window(
        self, shards: ShardSet, folder: Path, lost: tuple[int, ...], caplog: pytest.LogCaptureFixture
    ) -> None:
        split = shards.split("train")
        with running_nginx(folder) as nginx:
            opened = open_shards(nginx.url)
            for shard in lost:
                (folder / shard_names(shards)[shard]).unlink()
            loader = stream_from(opened, on_error="skip", num_shards=8)
            before = [order_of(loader).instance_epoch(epoch) for epoch in range(2)]
            epochs = [list(loader.epoch(epoch)) for epoch in range(2)]
            resumed = collect(stream_from(opened, on_error="skip", num_shards=8), 1, 5)
            loader.close()
            single = [request for request in nginx.requests() if request.start]
        assert_same(resumed, epochs[1][5:])
        for epoch, batches in enumerate(epochs):
            ids = np.array(instance_ids(batches))
            kept = ~np.isin(split.shards_N[before[epoch]], lost)
            np.testing.assert_array_equal(ids[kept], before[epoch][kept])
            assert not np.isin(split.shards_N[np.concatenate([batch.ids_S for batch in batches])], lost).any()
            assert [len(batch.ids_S) for batch in batches] == [8] * 18 + [4]
        warnings = [line for line in shard_warnings(caplog) if "training goes on without its samples" in line]
        assert len(warnings) == 2 * len(lost)  # once a shard and process: two loaders ran
        assert not single or len(lost) > 1

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda content: content[:-512], r"\d+ bytes, the manifest says \d+: it is truncated\): copy the shard there again"),
            (lambda content: content + b"\0" * 512, r"it has grown\)"),
            (lambda content: content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:], r"its SHA-256 is not the manifest's\)"),
        ],
        ids=["truncated", "grown", "changed"],
    )
    @pytest.mark.parametrize("server", ["http", "path", "memory"])
    def test_another_file_of_that_name_is_seen(self, shards: ShardSet, folder: Path, change: object, sentence: str, server: str) -> None:
        assert callable(change)
        path = folder / shard_names(shards)[1]
        content = change(path.read_bytes())
        if server == "path":
            opened = open_shards(folder)
            loader = stream_from(opened)
            path.write_bytes(content)
            with pytest.raises(ShardError, match=rf"cannot read {path} \(.*{sentence}"):
                list(loader.epoch(0))
            loader.close()
        elif server == "http":
            path.write_bytes(content)
            with running_nginx(folder) as nginx, pytest.raises(ShardError, match=rf"cannot read {nginx.url}/{path.name} \(.*{sentence}"):
                collect(stream_from(nginx.url))
        else:
            import fsspec

            memory = fsspec.filesystem("memory")
            for each in folder.iterdir():
                memory.pipe_file(f"/hurt/{each.name}", content if each == path else each.read_bytes())
            with pytest.raises(ShardError, match=rf"cannot read memory://hurt/{path.name} \((it is (longer|shorter)|its SHA)"):
                collect(stream_from("memory://hurt"))
            memory.rm("/hurt", recursive=True)


def test_a_shard_that_s3_lost_or_cut_is_named(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.format.origin._STORE_PIECE_BYTES", 4096)  # shards here are small, and yet of several pieces
    with running_s3() as server, closing(server.client()) as client:
        for path in Path(shards.root).iterdir():
            client.upload_file(str(path), server.bucket, f"one/{path.name}")
        use(monkeypatch, server.environment)
        opened = open_shards(f"s3://{server.bucket}/one")
        assert len(collect(stream_from(opened))) == 19
        key, content = f"one/{shard_names(shards)[0]}", (Path(shards.root) / shard_names(shards)[0]).read_bytes()
        client.put_object(Bucket=server.bucket, Key=key, Body=content[:8192])
        with pytest.raises(ShardError, match=r"cannot read s3://\S+train-000000\.tar \(it is shorter than the manifest says\)"):
            collect(stream_from(opened))
        client.delete_object(Bucket=server.bucket, Key=key)
        with pytest.raises(ShardError, match=r"cannot read s3://\S+train-000000\.tar \(it is not there\)"):
            collect(stream_from(opened))


def test_no_line_is_logged_where_nothing_happens(shards: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with running_nginx(Path(shards.root)) as nginx:
        collect(stream_from(nginx.url))
    assert not shard_warnings(caplog)
