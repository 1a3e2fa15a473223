"""Several processes, the ranks, that train one model: how they meet, what they add up, and what happens when one is lost."""

from __future__ import annotations

from bce3s.distributed.batch_norm import load_running_statistics, running_statistics, synced_batch_norm
from bce3s.distributed.joining import abandon_world, is_abandoned_on_error, is_launched, join_world, leave_world
from bce3s.distributed.lost_rank import LostRankError, is_lost_rank
from bce3s.distributed.world import ALONE, Agreement, World

__all__ = [
    "ALONE",
    "Agreement",
    "LostRankError",
    "World",
    "abandon_world",
    "is_abandoned_on_error",
    "is_launched",
    "is_lost_rank",
    "join_world",
    "leave_world",
    "load_running_statistics",
    "running_statistics",
    "synced_batch_norm",
]
