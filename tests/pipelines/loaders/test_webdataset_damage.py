"""Samples that do not decode, streamed: named or stood in for, also where a shard is lost as well.

The damage was there when the manifest was written: the shard is what the manifest says, an image in it is not whole.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.format import ShardSet
from pipelines.types import DamagedSampleError
from tests.nginx import running_nginx
from tests.pipelines.loaders.streams import (
    collect,
    instance_ids,
    shard_names,
    shard_warnings,
    stream_from,
)


def hurt(folder: Path, sample_ids: list[int], *, middle: bool = False, tables: bool = False) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    index = np.load(folder / "train.index.npy")
    for record in index[sample_ids]:
        entry = manifest["splits"]["train"]["shards"][int(record["shard"])]
        tar = bytearray((folder / entry["file"]).read_bytes())
        start, size = int(record["offset"]), int(record["size"])
        if tables:  # a Huffman table: DALI alone notices, when it decodes
            table = tar.index(b"\xff\xc4", start, start + size) + 5
            tar[table : table + 16] = b"\xff" * 16
        elif middle:
            tar[start + 2 : start + 300] = bytes(298)  # every table, and still a beginning and an end
        else:
            tar[start + size // 2 : start + size] = bytes(size - size // 2)
        (folder / entry["file"]).write_bytes(tar)
        entry["sha256"] = hashlib.sha256(tar).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_stop_names_the_sample_and_its_url(folder: Path) -> None:
    hurt(folder, [5])
    with (
        running_nginx(folder) as nginx,
        pytest.raises(DamagedSampleError, match=rf"sample 00000005 of {nginx.url}/train-00000\d\.tar does not decode") as found,
    ):
        collect(stream_from(nginx.url))
    assert found.value.ids.tolist() == [5]


def test_skip_goes_on_with_another_of_the_class_read_alone_where_its_shard_is_not_here(
    folder: Path, shards: ShardSet, caplog: pytest.LogCaptureFixture
) -> None:
    split = shards.split("train")
    # Each the last of its class in its shard, so that the next of its class lies in another one.
    members = [np.flatnonzero(split.labels_N == label) for label in (1, 2, 3)]
    last_ones = [int(ids[np.flatnonzero(np.diff(split.shards_N[ids].astype(int)))[0]]) for ids in members]
    hurt(folder, last_ones)
    with running_nginx(folder) as nginx:
        batches = collect(stream_from(nginx.url, on_error="skip"))
        single = [request for request in nginx.requests() if request.start]
    ids = np.array(instance_ids(batches))
    assert len(ids) == 74
    assert not np.isin(ids, last_ones).any()
    assert single
    assert not any("raise it" in line for line in shard_warnings(caplog))
    assert {request.body_bytes for request in single} <= set(split.sizes_N.tolist())
    assert sum("does not decode" in line for line in shard_warnings(caplog)) >= 1


def test_the_explanation_of_a_failure_reads_nothing_again(folder: Path) -> None:
    hurt(folder, [5], tables=True)
    with running_nginx(folder) as nginx:
        loader = stream_from(nginx.url, num_shards=2, prefetch_batches=4)  # more in flight than the buffer holds on to
        with pytest.raises(DamagedSampleError, match=rf"sample 00000005 of {nginx.url}/train-00000\d\.tar does not decode"):
            list(loader.epoch(0))
        loader.close()
        asked = [request for request in nginx.requests() if request.path.endswith(".tar")]
    assert not [request for request in asked if request.start]
    assert len(asked) == len({request.path for request in asked})


@pytest.mark.parametrize("tables", [False, True])
def test_skip_goes_on_without_damaged_samples_and_a_lost_shard(
    folder: Path, shards: ShardSet, tables: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Every other sample of a class is damaged, and the shard of its last one lost: each of these stands in for the other."""
    split = shards.split("train")
    members = np.flatnonzero(split.labels_N == 0)
    damaged, lost = members[::2].tolist(), int(split.shards_N[members[-1]])
    hurt(folder, damaged, tables=tables)
    (folder / shard_names(shards)[lost]).unlink()
    with running_nginx(folder) as nginx:
        loader = stream_from(nginx.url, on_error="skip", patience_s=0.5)
        for epoch in range(4):
            batches = list(loader.epoch(epoch))
            ids = np.concatenate([batch.ids_S for batch in batches])
            assert [len(batch.ids_S) for batch in batches] == [8] * 18 + [4]
            assert not np.isin(ids, damaged).any()
            assert not (split.shards_N[ids] == lost).any()
        loader.close()
    warnings = shard_warnings(caplog)
    assert sum("training goes on without its samples" in line for line in warnings) == 1
    assert any("another image of the class" in line for line in warnings)


def test_a_class_left_with_lost_samples_is_stood_in_for_by_others(folder: Path, shards: ShardSet) -> None:
    """Of a class one shard is lost, and every sample elsewhere damaged: the last of them has only a lost one to stand in for it."""
    split = shards.split("train")
    members = np.flatnonzero(split.labels_N == 1)
    lost = int(split.shards_N[members[0]])
    damaged = members[split.shards_N[members] != lost].tolist()
    assert damaged
    hurt(folder, damaged, tables=True)
    (folder / shard_names(shards)[lost]).unlink()
    with running_nginx(folder) as nginx:
        loader = stream_from(nginx.url, on_error="skip", patience_s=0.5)
        for epoch in range(4):
            ids = np.concatenate([batch.ids_S for batch in loader.epoch(epoch)])
            assert not np.isin(ids, members).any()
        loader.close()


def test_what_only_the_decoder_notices_is_named(folder: Path) -> None:
    from pipelines.loaders.damage import explain_failure

    hurt(folder, [7], middle=True)
    with running_nginx(folder) as nginx:
        loader = stream_from(nginx.url)
        split = vars(loader)["_source"]._split
        batches = iter(loader.epoch(0))
        try:
            next(batches)
            found = explain_failure(RuntimeError("Critical error in pipeline"), split, np.arange(5, 9))
        except DamagedSampleError as error:
            found = error
        loader.close()
    assert isinstance(found, DamagedSampleError)
    assert found.ids.tolist() == [7]
