"""What the ranks of one start of a run agree on: a name that no start before had, and how many starts there were."""

from __future__ import annotations

import secrets
import time
from typing import NamedTuple

import torch.distributed as dist

from bce3s.distributed.world import World

RETRY_S = 0.05
_OFFER, _NUM_STARTS, _JOB = "bce3s/offer", "bce3s/starts", "bce3s/job"


class Start(NamedTuple):
    """One start of a run: what to put before its keys in the store, how many there were before, and the word of all of them."""

    name: str
    restart: int
    job: str


def agree_on_start(store: dist.Store, world: World, timeout_s: float) -> Start:
    """Waits for all ranks and returns the same on each.

    torchrun keeps one store when it starts the ranks again, and each machine counts only the restarts that it began itself. A rank that is
    quicker than another would read what that one's predecessor wrote: an address where nobody listens any more (with torch 2.13 two of
    three restarts hung).

    So each rank says a random word; rank 0 offers a name along with the words it has read, again and again; a rank takes the offer that
    has its own word in it, and answers with its count. An offer or a word of an earlier start is thereby never taken.

    Args:
        store: common to all ranks, perhaps with what earlier starts left there.
        world: this rank, with the restarts that its machine counted.
        timeout_s: how long to wait for the others, in seconds.

    Raises:
        TimeoutError: somebody did not come; says who.
    """
    deadline_s = time.monotonic() + timeout_s
    if world.is_main:
        return _lead(store, world, deadline_s)
    name = _take_offer(store, world, deadline_s)
    while not store.check([f"{name}/restart"]):
        _pause(deadline_s, "rank 0 waits for another")
    return Start(name, int(store.get(f"{name}/restart")), store.get(_JOB).decode())


def _lead(store: dist.Store, world: World, deadline_s: float) -> Start:
    name, others = secrets.token_hex(8), range(1, world.size)
    num_earlier_starts = store.add(_NUM_STARTS, 1) - 1
    answers = [f"{name}/{rank}" for rank in others]
    while not store.check(answers):
        if store.check([_word_of(rank) for rank in others]):
            store.set(_OFFER, " ".join([name, *(store.get(_word_of(rank)).decode() for rank in others)]))
        missing = [str(rank) for rank, answer in zip(others, answers, strict=True) if not store.check([answer])]
        _pause(deadline_s, f"missing: {', '.join(missing[:8])}{' and others' if len(missing) > 8 else ''}")
    if not store.check([_JOB]):
        store.set(_JOB, world.job or secrets.token_hex(8))
    restart = max(world.restart, num_earlier_starts, *(int(store.get(answer)) for answer in answers))
    store.set(f"{name}/restart", str(restart))
    return Start(name, restart, store.get(_JOB).decode())


def _take_offer(store: dist.Store, world: World, deadline_s: float) -> str:
    word = secrets.token_hex(8)
    store.set(_word_of(world.rank), word)
    while True:
        name, *words = store.get(_OFFER).decode().split() if store.check([_OFFER]) else [""]
        if words[world.rank - 1 : world.rank] == [word]:
            store.set(f"{name}/{world.rank}", str(world.restart))
            return name
        _pause(deadline_s, "rank 0 did not come, or waits for another")


def _pause(deadline_s: float, reason: str) -> None:
    if time.monotonic() > deadline_s:
        raise TimeoutError(reason)
    time.sleep(RETRY_S)


def _word_of(rank: int) -> str:
    return f"bce3s/word/{rank}"
