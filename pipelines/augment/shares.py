"""Compiled loops over the images of a batch, in as many threads as torch may use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Below this much image, one to a few ms of work, starting threads costs more than they save.
BYTES_WORTH_THREADS = 2 << 20


def in_shares(work: Callable[[int, int], None], count: int, image_bytes: int) -> None:
    """Calls `work(first, last)`, which releases the GIL, over shares of 0…count − 1; raises what it raises.

    The threads live for one call: they cost 0.1 ms against several of work, and neither a fork nor another caller can be in their way,
    unlike numba's own, which abort when two threads start parallel loops at once.
    """
    num_threads = min(torch.get_num_threads(), count) if image_bytes >= BYTES_WORTH_THREADS else 1
    if num_threads <= 1:
        work(0, count)
        return
    bounds = [count * share // num_threads for share in range(num_threads + 1)]
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))  # the list passes on what a share raised
