"""The ranks of one run: who this process is among them, what they gather and sum, and what they decide together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Agreement:
    """What the ranks decide together on the host, one step late: whether one was interrupted, wants to save, or met a broken loss.

    The flags travel while the next step is computed, so nobody waits for the others, and every rank reads the same answer at the same
    step. They go through gloo, which needs no device and, unlike NCCL, raises an error at once when a peer dies.
    """

    def __init__(self, group: Any | None) -> None:
        """Over a gloo process group; None is a single process."""
        self._group = group
        self._pending: tuple[Any, Tensor] | None = None

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Sends this step's flags and returns those of the step before: each true where it was on any rank.

        All false at the first call and after `settle`. A single process gets its own flags back at once.

        Raises:
            RuntimeError: a peer died (`is_lost_rank`).
        """
        if self._group is None:
            return flags
        decided = self._receive() or (False,) * len(flags)
        assert len(decided) == len(flags), "every exchange carries the same flags"
        votes = torch.tensor(flags, dtype=torch.uint8)
        self._pending = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group, async_op=True), votes
        return decided

    def settle(self) -> None:
        """Waits for the exchange in flight and drops its answer; at the end of an epoch or a run, on every rank alike."""
        self._receive()

    def _receive(self) -> tuple[bool, ...]:
        if self._pending is None:
            return ()
        (work, votes), self._pending = self._pending, None
        work.wait()
        return tuple(vote > 0 for vote in votes.tolist())


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run; `World()` is a single process without a process group.

    Tensors lie on the run's device; the collectives are called by all ranks alike and in the same order. Under CUDA they are queued on
    the current stream without a wait of the host.

    Args:
        rank: of this process, from 0.
        size: number of ranks.
        local_rank: its number on its machine, from 0, and that of its GPU.
        restart: how often the launcher has started this run again.
        job: a word that is the same in all these starts, and in no other job; empty without a launcher.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restart: int = 0
    job: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes files and talks to the user."""
        return self.rank == 0

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows [n, ...] of every rank, n and dtype alike on all, to [size·n, ...] in rank order, detached; alone, `rows` themselves."""
        rows = rows.detach()
        if self.size == 1:
            return rows
        gathered = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        _all_gather(gathered, rows.contiguous())
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """`values` with the sum over all ranks written into it; every rank gets the same bits."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Float `values` with the mean over all ranks written into it; every rank gets the same bits."""
        return self.sum(values).div_(self.size) if self.size > 1 else values

    def agreement(self) -> Agreement:
        """A channel of its own; opening it is a collective call."""
        return Agreement(dist.new_group(backend="gloo") if self.size > 1 else None)


# torch 2.13 renamed it, and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

ALONE = World()
