"""The order of whole shards: complete, reproducible, and as balanced as windows of shards allow, measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import OrderConfig
from pipelines.format.index import INDEX_DTYPE, npy_bytes
from pipelines.format.origin import LocalOrigin
from pipelines.format.reader import RemoteSplit
from pipelines.loaders.block_order import BlockOrder
from pipelines.order import SampleOrder, class_probabilities
from pipelines.types import ConfigError, IntArray, ShardError

SHARD_BYTES = 1 << 20
BALANCED = OrderConfig(sampling="class-balanced")


def split_of(folder: Path, labels_N: IntArray, num_shards: int) -> RemoteSplit:
    """A split of evenly filled shards, of which there is nothing but the index."""
    index = np.zeros(len(labels_N), INDEX_DTYPE)
    index["label"], index["shard"] = labels_N, np.arange(len(labels_N)) * num_shards // len(labels_N)
    index["offset"], index["size"], index["height"], index["width"] = 512, 100, 32, 32
    (folder / "train.index.npy").write_bytes(npy_bytes(index))
    shards = [{"file": f"train-{i:06d}.tar", "shard_bytes": SHARD_BYTES, "sha256": "0" * 64} for i in range(num_shards)]
    counts = np.bincount(labels_N).tolist()
    entry = {"num_samples": len(labels_N), "class_counts": counts, "shards": shards, "index": {"file": "train.index.npy"}}
    return RemoteSplit(LocalOrigin(folder), "train", entry)


def long_tail(num_classes: int, largest: int, imbalance: float) -> IntArray:
    counts = np.rint(largest * imbalance ** (-np.arange(num_classes) / (num_classes - 1))).astype(int)
    return np.random.default_rng(0).permutation(np.repeat(np.arange(num_classes), counts)).astype(np.int64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> RemoteSplit:
    return split_of(tmp_path_factory.mktemp("small"), long_tail(6, 40, 20), num_shards=7)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> RemoteSplit:
    return split_of(tmp_path_factory.mktemp("large"), long_tail(100, 929, 100), num_shards=64)


def order_of(
    split: RemoteSplit,
    shards_a_window: int = 2,
    world_size: int = 1,
    batch_size: int = 12,
    seed: int = 0,
    config: OrderConfig = BALANCED,
    lost: tuple[int, ...] = (),
) -> BlockOrder:
    return BlockOrder(
        split,
        int(split.labels_N.max()) + 1,
        batch_size=batch_size,
        seed=seed,
        config=config,
        world_size=world_size,
        window_bytes=shards_a_window * SHARD_BYTES,
        lost=frozenset(lost),
    )


def rank_stream(order: BlockOrder, ids_E: IntArray, rank: int, world_size: int) -> IntArray:
    return ids_E[np.concatenate([order.step_positions(step, rank, world_size) for step in range(order.num_steps)])]


@pytest.mark.parametrize("shards_a_window", [1, 2, 3, 7])
def test_each_sample_comes_once_an_epoch_and_epochs_differ(small: RemoteSplit, shards_a_window: int) -> None:
    order = order_of(small, shards_a_window)
    epochs = [order.instance_epoch(epoch) for epoch in (0, 1, 0)]
    for ids in epochs:
        assert sorted(ids.tolist()) == list(range(len(small)))
    np.testing.assert_array_equal(epochs[0], epochs[2])
    assert (epochs[0] != epochs[1]).mean() > 0.5
    assert (epochs[0] != order_of(small, shards_a_window, seed=1).instance_epoch(0)).mean() > 0.5


@pytest.mark.parametrize("config", [BALANCED, OrderConfig(), OrderConfig(sampling="square-root", draw="systematic")])
def test_one_window_of_all_shards_is_the_exact_order(small: RemoteSplit, config: OrderConfig) -> None:
    order, exact = order_of(small, 7, config=config), SampleOrder(small.labels_N, 6, 12, 0, config)
    for epoch in (0, 3):
        np.testing.assert_array_equal(order.instance_epoch(epoch), exact.instance_epoch(epoch))
        np.testing.assert_array_equal(order.partner_epoch(epoch), exact.partner_epoch(epoch))


@pytest.mark.parametrize("config", [BALANCED, OrderConfig(sampling="square-root", draw="systematic", drop_last=True)])
@pytest.mark.parametrize(
    ("shards_a_window", "world_size", "lost"),
    [(1, 1, ()), (3, 1, ()), (7, 1, ()), (2, 2, ()), (1, 7, ()), (1, 1, (1, 5)), (3, 1, (1, 5)), (7, 1, (1, 5)), (2, 2, (1, 5))],
)
def test_the_same_partner_is_the_instance_stream_once_more(
    small: RemoteSplit, config: OrderConfig, shards_a_window: int, world_size: int, lost: tuple[int, ...]
) -> None:
    """In windows, on ranks, and where shards are lost: a pair is two views of one image, also of a replacement."""
    orders = [
        order_of(small, shards_a_window, world_size, 3 * world_size, config=replace(config, partner=partner, drop_last=True), lost=lost)
        for partner in ("same", "drawn")
    ]
    for epoch in (0, 2):
        ids = orders[0].instance_epoch(epoch)
        np.testing.assert_array_equal(orders[0].partner_epoch(epoch), ids)
        np.testing.assert_array_equal(orders[1].instance_epoch(epoch), ids)
        assert (orders[1].partner_epoch(epoch) != ids).any()
        for rank in range(world_size):
            stream = rank_stream(orders[0], ids, rank, world_size)
            assert set(small.shards_N[stream].tolist()) == {use.shard for use in orders[0].uses(epoch, rank)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_draw_from_shards_of_their_own_that_uses_names_in_time(small: RemoteSplit, world_size: int) -> None:
    batch_size = 3 * world_size
    order = order_of(small, 1, world_size, batch_size, config=OrderConfig(sampling="class-balanced", drop_last=True))
    seen: list[set[int]] = []
    for rank in range(world_size):
        streams = [rank_stream(order, ids, rank, world_size) for ids in (order.instance_epoch(2), order.partner_epoch(2))]
        assert all(len(stream) == 3 * order.num_steps for stream in streams)
        for start_step in (0, 1, order.num_steps - 1):
            uses = order.uses(2, rank, start_step)
            assert [use.first_step for use in uses] == sorted(use.first_step for use in uses)
            drawn: set[int] = set()
            for step in range(start_step, order.num_steps):
                of_step = np.concatenate([stream[3 * step : 3 * step + 3] for stream in streams])
                shards = set(small.shards_N[of_step].tolist())
                assert shards <= {use.shard for use in uses if use.first_step <= step <= use.last_step}
                drawn |= shards
            assert drawn == {use.shard for use in uses}
        seen.append({use.shard for use in order.uses(2, rank)})
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_a_rank_with_fewer_samples_begins_its_windows_again(small: RemoteSplit) -> None:
    """Seven shards and two ranks: three shards against four."""
    order = order_of(small, 1, 2, 4, config=OrderConfig(drop_last=True))
    poorer = min(range(2), key=lambda rank: len({use.shard for use in order.uses(0, rank)}))
    shards = [use.shard for use in order.uses(0, poorer)]
    assert shards[3] == shards[0]
    ids = rank_stream(order, order.instance_epoch(0), poorer, 2)
    assert np.bincount(ids).max() == 2


def test_a_rank_with_one_window_keeps_its_shards(small: RemoteSplit) -> None:
    order = order_of(small, 4, 2, 4, config=OrderConfig(drop_last=True))
    for rank in range(2):
        uses = order.uses(0, rank)
        assert len({use.shard for use in uses}) == len(uses)
        assert {(use.first_step, use.last_step) for use in uses} == {(0, order.num_steps - 1)}


def test_more_ranks_than_shards_is_one_sentence(small: RemoteSplit) -> None:
    with pytest.raises(ConfigError, match=r"8 ranks cannot share the 7 shards of 'train' .*start fewer ranks"):
        order_of(small, world_size=8)


@pytest.mark.parametrize("draw", ["independent", "systematic"])
def test_lost_shards_are_replaced_within_their_window_by_their_class(small: RemoteSplit, draw: str) -> None:
    config = OrderConfig(sampling="class-balanced", draw=draw)
    order, lost = order_of(small, 3, config=config), (1, 5)
    without = order.without(frozenset(lost))
    windows = {use.shard: use.first_step for use in order.uses(4, 0)}
    kept = 0
    for before, after in ((order.instance_epoch(4), without.instance_epoch(4)), (order.partner_epoch(4), without.partner_epoch(4))):
        gone = np.isin(small.shards_N[before], lost)
        np.testing.assert_array_equal(before[~gone], after[~gone])
        assert not np.isin(small.shards_N[after], lost).any()
        for old, new in zip(before[gone], after[gone], strict=True):
            same_window = windows[int(small.shards_N[old])] == windows[int(small.shards_N[new])]
            alone = (windows[int(small.shards_N[old])] == np.array([windows[s] for s in range(7) if s not in lost])).sum() == 0
            assert same_window or alone
            kept += small.labels_N[old] == small.labels_N[new]
        assert kept >= 0.6 * gone.sum()
    assert not {use.shard for use in without.uses(4, 0)} & set(lost)


def test_a_window_lost_as_a_whole_is_filled_from_another_and_all_lost_is_one_sentence(small: RemoteSplit) -> None:
    order = order_of(small, 1)
    for lost in range(7):
        without = order.without(frozenset({lost}))
        assert not (small.shards_N[without.instance_epoch(0)] == lost).any()
    with pytest.raises(ShardError, match=r"no shard of 'train' .* can be read"):
        order.without(frozenset(range(7))).instance_epoch(0)


def distance(ids_E: IntArray, split: RemoteSplit, probabilities_K: np.ndarray) -> float:
    """Total variation distance of the drawn classes from what they should be."""
    frequencies_K = np.bincount(split.labels_N[ids_E], minlength=len(probabilities_K)) / len(ids_E)
    return float(np.abs(frequencies_K - probabilities_K).sum() / 2)


def burstiness(ids_E: IntArray, split: RemoteSplit, probabilities_K: np.ndarray, span: int = 250) -> float:
    """Mean over classes of a class's variance in `span` consecutive draws, against that of independent draws."""
    labels_E = split.labels_N[ids_E[: len(ids_E) // span * span]].reshape(-1, span)
    counts = np.stack([np.bincount(row, minlength=len(probabilities_K)) for row in labels_E])
    return float((counts.var(0, ddof=1) / (span * probabilities_K * (1 - probabilities_K))).mean())


def measured(split: RemoteSplit, shards_a_window: int, num_epochs: int) -> tuple[float, float, float]:
    """Distance of one epoch (mean), distance of `num_epochs` together, burstiness (mean)."""
    probabilities_K = class_probabilities(np.bincount(split.labels_N), BALANCED, 0)
    order = order_of(split, shards_a_window, batch_size=256)
    epochs = [order.partner_epoch(epoch) for epoch in range(num_epochs)]
    return (
        float(np.mean([distance(ids, split, probabilities_K) for ids in epochs])),
        distance(np.concatenate(epochs), split, probabilities_K),
        float(np.mean([burstiness(ids, split, probabilities_K) for ids in epochs])),
    )


def test_class_balance_is_as_approximate_as_the_docstring_says(large: RemoteSplit) -> None:
    assert len(large) == 20_244
    one, four, all_64 = (measured(large, window, 20) for window in (1, 4, 64))
    exact = SampleOrder(large.labels_N, 100, 256, 7, BALANCED)  # another seed: other draws of the same order
    probabilities_K = class_probabilities(np.bincount(large.labels_N), BALANCED, 0)
    noise = [distance(exact.partner_epoch(epoch), large, probabilities_K) for epoch in range(20)]
    assert abs(all_64[0] - np.mean(noise)) < 4 * np.std(noise, ddof=1) / np.sqrt(10)
    for (epoch_distance, all_distance, clumps), (epoch_said, all_said, clumps_said) in zip(
        (one, four, all_64), ((0.030, 0.013, 3.6), (0.029, 0.007, 1.8), (0.028, 0.006, 1.0)), strict=True
    ):
        assert epoch_distance == pytest.approx(epoch_said, abs=0.001)
        assert all_distance == pytest.approx(all_said, abs=0.001)
        assert clumps == pytest.approx(clumps_said, abs=0.1)
