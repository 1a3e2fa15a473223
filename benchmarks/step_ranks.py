"""What several ranks cost: gloo ranks with a thread each, on one machine, against one process that does the work of one rank."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from step_bench import Bench, Figures, ratios_to, spread, step_figures

from bce3s.distributed import World, join_world, leave_world
from bce3s.throughput.timing import Budget
from pipelines.config import require

# Read by the libraries of the new processes when they start.
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}


def measure_ranks(bench: Bench, budget: Budget, settings: tuple[str, ...], num_ranks: int) -> dict[str, Figures]:
    """Time of a step over that of one process with the work of one rank, while the others wait.

    "side by side" is the same process beside as many others that know nothing of each other: what the machine's memory and cores take.
    "ranks" adds all that ranks exchange, the agreement after each step included. The uniform term is shared by the ranks, so each of
    them computes less of it than the one process.

    Raises:
        ConfigError: a batch that the ranks cannot share.
    """
    if bench.placement().device.type == "cuda":
        return {"ranks": {"reason": "gloo ranks are measured on a CPU; add --device cpu"}}
    require(num_ranks >= 2, f"--ranks must be at least 2, not {num_ranks}")
    require(bench.batch_size % num_ranks == 0, f"--batch-size {bench.batch_size} cannot be shared by {num_ranks} ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        with patch.dict(os.environ, ONE_THREAD):
            torch.multiprocessing.spawn(run_rank, (num_ranks, port, bench, budget, settings, out), nprocs=num_ranks)
        found: dict[str, list[float]] = json.loads(out.read_text())
    exchange_s = found.pop("exchange")
    processor_s = {name: found.pop(f"{name}, processor") for name in list(found) if f"{name}, processor" in found}
    alone, beside = found["one process"], found["side by side"]
    rows = {}
    for name, seconds in found.items():
        # Views of one rank: what it trains on in a step.
        rows[name] = step_figures(tuple(2 * bench.batch_size / num_ranks / one for one in seconds), bench.batch_size // num_ranks)
        rows[name] |= ratios_to(alone, seconds, "ratio") | ratios_to(beside, seconds, "ratio_to_side_by_side")
        rows[name] |= spread("processor_ms", [1e3 * one for one in processor_s[name]])
        rows[name] |= ratios_to(processor_s["one process"], processor_s[name], "processor_ratio")
    rows["ranks"] |= spread("exchange_ms", [1e3 * one for one in exchange_s])
    return rows


def run_rank(rank: int, num_ranks: int, port: int, bench: Bench, budget: Budget, settings: tuple[str, ...], out: Path) -> None:
    """One rank: takes its turns, and the first one writes what was found."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    world = join_world("cpu")
    alone = bench.__class__(**{**bench.__dict__, "batch_size": bench.batch_size // num_ranks})
    batch, agreement = alone.batch(), world.agreement()
    own = alone.step(*settings)
    shared, synced = bench.step(*settings, world=world), bench.step(*settings, "sync_batch_norm=true", world=world)
    exchange_s = 0.0

    def agree() -> None:
        nonlocal exchange_s
        started_s = time.perf_counter()
        agreement.exchange(False, False)
        exchange_s += time.perf_counter() - started_s

    ways: dict[str, tuple[Callable[[], object], bool]] = {
        "one process": (lambda: own(batch, 1), False),
        "side by side": (lambda: own(batch, 1), True),
        "ranks": (lambda: (shared(batch, 1), agree()), True),
        "ranks, sync_batch_norm": (lambda: (synced(batch, 1), agree()), True),
    }
    found: dict[str, list[float]] = {name: [] for way in ways for name in (way, f"{way}, processor")} | {"exchange": []}
    num_steps = 1
    for turn in range(-1, budget.repeats):
        for name, (work, together) in list(ways.items())[:: 1 if turn % 2 else -1]:
            exchange_s = 0.0
            seconds, processor_s = time_together(work, num_steps, world, everyone=together)
            agreement.settle()
            if turn >= 0:
                found[name].append(seconds)
                found[f"{name}, processor"].append(processor_s)
                found["exchange"] += [exchange_s / num_steps] if name == "ranks" else []
        if turn < 0:  # everything has run once: now for how many steps fill a measurement
            seconds, _ = time_together(ways["one process"][0], 1, world, everyone=False)
            num_steps = max(1, round(budget.seconds / seconds))
    if world.is_main:
        out.write_text(json.dumps(found))
    leave_world()


def time_together(work: Callable[[], object], num_steps: int, world: World, *, everyone: bool) -> tuple[float, float]:
    """Seconds of a step on the slowest rank, of the clock and of the processor; of the main rank where the others wait."""
    world.sum(torch.zeros(1))
    started_s, began_s = time.perf_counter(), time.process_time()
    for _ in range(num_steps if everyone or world.is_main else 0):
        work()
    took_s = torch.tensor([[time.perf_counter() - started_s, time.process_time() - began_s]], dtype=torch.float64) / num_steps
    clock_s, processor_s = world.gather_rows(took_s).amax(0).tolist()
    return clock_s, processor_s
