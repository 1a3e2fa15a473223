"""In which order the samples of a data set are written."""

from __future__ import annotations

import numpy as np

from pipelines.randomness import Purpose, derive_key, permutation
from pipelines.types import SPLITS, IntArray, OpenDataset


def write_orders(dataset: OpenDataset, seed: int, limit: int | None = None) -> dict[str, IntArray]:
    """The training split shuffled by `seed`, so that sequential readers see mixed classes; the others as they come.

    Args:
        dataset: whose splits.
        seed: of the shuffle, and of the choice where there is a limit.
        limit: at most so many of each split: a random choice.

    Returns:
        split -> int64 [N], positions in the split, what `write_shards` takes.
    """
    orders = {}
    for number, name in enumerate(SPLITS):
        size = len(dataset.splits[name].labels_N)
        order_N = np.arange(size, dtype=np.int64)
        if name == "train" or (limit is not None and limit < size):
            order_N = permutation(derive_key(seed, Purpose.SHARD_ORDER, *([number] if number else [])), size)[:limit]
        orders[name] = order_N if name == "train" else np.sort(order_N)
    return orders
