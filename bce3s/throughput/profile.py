"""Measures every row of the profile, each in the state of the page cache and of the loader that it claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from os import sched_getaffinity
from typing import Any

import numpy as np

from bce3s.graph import fixed_copy
from bce3s.step import TrainStep
from bce3s.throughput.copies import copy_rows
from bce3s.throughput.decode import gpu_decode_rows, host_decode_rows, host_read_rows
from bce3s.throughput.page_cache import resident_share, total_memory_bytes
from bce3s.throughput.rows import NAMES, NEEDS_CUDA, Row, complete
from bce3s.throughput.step_parts import forward_flops, part_rows
from bce3s.throughput.step_rows import STEP_SKIPPED, build_steps, graph_row, measured_peak, with_mfu
from bce3s.throughput.storage import storage_rows, warm_ids
from bce3s.throughput.timing import MEASURED_FAILURES, Budget, reason_of, sample_in_turns
from bce3s.throughput.together import DiscardingReader, Together, contention_probe, loader_probe, step_probe
from bce3s.throughput.verdict import Facts
from bce3s.throughput.workload import EndlessBatches, Workload
from pipelines.loaders.cached import KEPT_BATCHES
from pipelines.types import Batch

_DECODE_WHEN_BUILT = ("resident", "cached")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was measured: every row of `rows.NAMES`, the state of the page cache in words, and what the verdict has to know."""

    rows: list[Row]
    page_cache: str
    facts: Facts


def measure(workload: Workload, budget: Budget, *, compiled: bool, say: Callable[[str], None]) -> Profile:
    """Measures everything; `say` is told what comes next.

    Raises:
        UserError: the run's loader cannot be built.
    """
    cuda = workload.device.type == "cuda"
    # What the user may have got wrong shows here and not after a minute: the network, its loss, and the loader, unless it would decode all.
    steps = build_steps(workload, compiled=compiled)
    workload.loader("synthetic" if workload.choice.name in _DECODE_WHEN_BUILT else None).close()
    # First what needs a page cache that no loader has filled and mapped.
    say("storage, and reading the images that later rows will find in memory")
    rows = list(storage_rows(workload, budget)) if not workload.is_streamed else []
    found = _resident(workload)
    rows += _rows_of_encoded_images(workload, budget, say)
    if cuda:
        say("copies to the device")
        rows += copy_rows(workload.num_samples, workload.config.data.image_size, workload.device, budget)
    say(f"loader {workload.choice.name}")
    loader = workload.loader()
    try:
        batches = EndlessBatches(loader, workload.first_epoch)
        batch = fixed_copy(next(batches))
        say("loader, step, and both together")
        rows += _loader_and_step_rows(workload, budget, batches, batch, steps)
        say("parts of the step")
        rows += part_rows(
            steps["step.channels_last" if workload.placement.channels_last else "step.contiguous"], batch, batches.num_steps, budget
        )
    finally:
        loader.close()
    say("arithmetic peak")
    flops, peak = forward_flops(steps[workload.step_key], workload.config.data.image_size), measured_peak(workload, budget)
    if cuda and "step.graph" not in steps:
        say("CUDA graph")
        rows.append(graph_row(workload, batch, budget))
    if "step.compiled" not in steps:
        rows.append(Row(key="step.compiled", reason=STEP_SKIPPED))
    page_cache = _page_cache_state(workload, rows[0], found)
    return Profile(rows=complete(with_mfu(rows, flops, peak), NEEDS_CUDA), page_cache=page_cache, facts=facts_of(workload))


def _rows_of_encoded_images(workload: Workload, budget: Budget, say: Callable[[str], None]) -> list[Row]:
    """The rows "read.*" and "decode.*"; of streamed shards, "storage.*" too."""
    cuda = workload.device.type == "cuda"
    if workload.is_streamed:
        groups = ("storage", "read", "decode")
        keys = [key for key in NAMES if key.partition(".")[0] in groups and (cuda or not key.startswith("decode.gpu"))]
        return [Row(key=key, reason="the shards lie at a URL") for key in keys]
    say("host read")
    rows = list(host_read_rows(workload, budget))
    say("decode on the host")
    rows += host_decode_rows(workload, budget)
    if cuda:
        say("decode on the GPU")
        rows += gpu_decode_rows(workload, budget)
    return rows


def _resident(workload: Workload) -> float | str:
    """Share of the training shards' pages in the page cache, or why nobody knows."""
    try:
        return 0.0 if workload.is_streamed else resident_share(workload.split.paths)
    except OSError as error:
        return reason_of(error)


def _page_cache_state(workload: Workload, cold: Row, found: float | str) -> str:
    """What the rows read from; `found` is what `_resident` gave before the first of those that come after the storage's."""
    if workload.is_streamed:
        return "none here, the shards lie at a URL"
    dropped = (
        "cold row: every page dropped by posix_fadvise before each repeat, seen to be gone by mincore"
        if cold.rates
        else f"cold row not measured: {cold.reason}"
    )
    left = _resident(workload)
    held = (
        found
        if isinstance(found, str)
        else f"{found:.0%} of the training shards' pages in memory before them, "
        + (left if isinstance(left, str) else f"{left:.0%} after the last")
    )
    share = len(warm_ids(workload)) / len(workload.epoch_ids())
    read = f"all other rows: the first {share:.0%} of what an epoch draws read once before, {held}"
    return "; ".join([dropped, read, *unlike_the_run(workload)])


def unlike_the_run(workload: Workload) -> list[str]:
    """How reading differs between the rows of one stage and the run's loader."""
    config = workload.config.data
    if workload.choice.name == "webdataset":
        return ["loader 'webdataset' reads whole shards, the storage rows read the images one by one in its order"]
    if workload.choice.name == "dali" and config.dali.feed == "index":
        return ["rows host read and decode are fed from memory, the run's data.dali.feed=index has DALI read the tars itself"]
    return []


def _loader_and_step_rows(
    workload: Workload, budget: Budget, batches: EndlessBatches, batch: Batch, steps: dict[str, TrainStep]
) -> Iterator[Row]:
    """The rows "loader", "step.*" and "together.*", measured in turns."""
    depth, device, step = workload.config.data.prefetch_batches, workload.device, steps[workload.step_key]
    reader, real = DiscardingReader(batches, device), Together(batches, step, depth)
    probes = {
        "loader": loader_probe(batches, depth),
        **{key: step_probe(one, batch, batches.num_steps) for key, one in steps.items()},
        "together.discarded": contention_probe(reader, step, batch, batches.num_steps),
        "together.real": real.probe,
    }
    with ExitStack() as opened:
        try:
            cached = workload.loader("cached")
            opened.callback(cached.close)
            # Its first batches are decoded and kept; the warm-up goes beyond them.
            probes["together.cached"] = Together(EndlessBatches(cached, workload.first_epoch), step, KEPT_BATCHES).probe
        except MEASURED_FAILURES as error:
            yield Row(key="together.cached", reason=reason_of(error))
        outcomes = sample_in_turns(probes, budget, device)
    stall_shares = real.stall_shares or [0.0]
    details: dict[str, dict[str, Any]] = {
        "together.discarded": {"batches_per_step": reader.num_drawn / max(1, reader.num_steps)},
        "together.real": {"stall_share": float(np.median(stall_shares)), "stall_shares": stall_shares},
    }
    for key, outcome in outcomes.items():
        if isinstance(outcome, str):
            yield Row(key=key, reason=outcome)
        else:
            yield Row(key=key, rates=outcome, details=details.get(key, {}))


def facts_of(workload: Workload) -> Facts:
    """What the verdict has to know of the run beside its rates."""
    config, split = workload.config.data, workload.split
    return Facts(
        loader=workload.choice.name,
        device=workload.device.type,
        step_key=workload.step_key,
        crop=config.augment.crop,
        policy=config.augment.policy,
        precision=workload.placement.precision,
        num_threads=config.num_threads,
        num_cores=len(sched_getaffinity(0)),
        streamed=workload.is_streamed,
        resident_fits=workload.choice.resident_fits,
        fits_page_cache=int(split.shard_bytes.sum()) < 0.8 * total_memory_bytes(),
        stored_side=float(np.median(np.minimum(split.heights_N, split.widths_N))),
        needed_side=config.image_size / config.augment.eval_crop,
    )
