"""Who converts the units: processes of this machine, this process itself, or a Ray cluster. Each yields records as units finish."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from pipelines.config import require, require_choice
from pipelines.conversion.plan import Unit
from pipelines.conversion.unit import Samples, Tally, UnitRecord, convert_unit
from pipelines.store import Store
from pipelines.types import BackendError, IntArray, ShardError

EXECUTORS = ("local", "ray")
_TICK_S = 0.1
_PR_SET_PDEATHSIG = 1
_ANSWER_S, _FAREWELL_S = 5.0, 10.0  # of a Ray cluster: to be there, and to end tasks that were cancelled

# A finished shard waits for the disk: a quarter more processes than cores keeps the cores busy meanwhile.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

OnProgress = Callable[[int, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Units to convert, and with what."""

    samples: Samples
    units: list[Unit]
    store: Store


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """How many hands.

    Args:
        executor: "local" or "ray".
        num_processes: of this machine; a cluster uses all its cores.
    """

    executor: str = "local"
    num_processes: int = _CORES + (_CORES + 3) // 4

    def __post_init__(self) -> None:
        require_choice("executor", self.executor, EXECUTORS)
        require(self.num_processes >= 1, f"processes must be at least 1, not {self.num_processes}")


def run_units(job: Job, options: ExecutorOptions, on_progress: OnProgress) -> Iterator[UnitRecord]:
    """Converts all units; `on_progress(images, bytes, skipped)` is called with running totals: at the start, and several times a second.

    Raises:
        DatasetError, ShardError, OSError: the first failure of any unit; those under way are stopped and leave nothing.
    """
    if not job.units:
        return
    if options.executor == "ray":
        yield from _run_ray(job, on_progress)
    elif job.store.in_process or options.num_processes == 1:
        yield from _run_here(job, on_progress)
    else:
        yield from _run_processes(job, min(options.num_processes, len(job.units)), on_progress)


def _run_here(job: Job, on_progress: OnProgress) -> Iterator[UnitRecord]:
    rows_U3 = np.zeros((len(job.units), 3), np.int64)

    def report() -> None:
        on_progress(*rows_U3.sum(axis=0).tolist())

    report()
    for unit, row in zip(job.units, rows_U3, strict=True):
        yield convert_unit(job.samples, unit, job.store, Tally(row=row, on_sample=report))


# ---- processes of this machine

_inherited: tuple[Job, IntArray, IntArray] | None = None  # set in a worker only, right after the fork


def _adopt(job: Job, rows_U3: IntArray, stop_1: IntArray, parent: int) -> None:
    global _inherited
    _inherited = job, rows_U3, stop_1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and tells us by `stop`
    if sys.platform == "linux":
        # A parent that is killed cannot tell anybody; without this its workers would write on beside the next run.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _convert_number(number: int) -> UnitRecord:
    assert _inherited is not None
    job, rows_U3, stop_1 = _inherited
    return convert_unit(job.samples, job.units[number], job.store, Tally(row=rows_U3[number], stop=stop_1))


def _run_processes(job: Job, num_processes: int, on_progress: OnProgress) -> Iterator[UnitRecord]:
    """Forked workers inherit the data set, so that nothing is pickled and lists of names are shared; counters lie in shared memory."""
    counters = np.frombuffer(mmap.mmap(-1, 8 * (3 * len(job.units) + 1)), np.int64)
    rows_U3, stop_1 = counters[:-1].reshape(-1, 3), counters[-1:]
    fork = get_context("fork")
    pool = ProcessPoolExecutor(num_processes, fork, initializer=_adopt, initargs=(job, rows_U3, stop_1, os.getpid()))
    try:
        # Not `futures.wait`: interrupted, it may keep the locks of futures that the pool then waits for when it shuts down.
        finished: SimpleQueue[Future[UnitRecord]] = SimpleQueue()
        for number in range(len(job.units)):
            pool.submit(_convert_number, number).add_done_callback(finished.put)
        on_progress(0, 0, 0)  # rates count from here; not earlier, for what it starts must not be forked
        num_left = len(job.units)
        while num_left:
            try:
                future = finished.get(timeout=_TICK_S)
            except Empty:
                on_progress(*rows_U3.sum(axis=0).tolist())
                continue
            on_progress(*rows_U3.sum(axis=0).tolist())
            num_left -= 1
            yield future.result()
    except BrokenProcessPool:
        raise ShardError(
            "a worker process was killed, probably because memory ran out: continue with --resume and fewer --processes"
        ) from None
    finally:
        stop_1[0] = 1
        pool.shutdown(wait=True, cancel_futures=True)


# ---- a Ray cluster


def _run_ray(job: Job, on_progress: OnProgress) -> Iterator[UnitRecord]:
    """One task a unit, one core a task. The cluster is the one RAY_ADDRESS names, or this machine; it must see source and output."""
    if job.store.in_process:
        raise ShardError(f"{job.store.location} exists in this process only, where a cluster cannot write: choose another --out")
    try:
        import ray
    except ImportError:
        raise BackendError("--executor ray needs Ray: pip install 'bce3s[ray]'") from None
    started = not ray.is_initialized()
    if started:
        _join_cluster(os.environ.get("RAY_ADDRESS") or "local")
    pending: list[Any] = []
    try:
        shared = ray.put(job)
        convert = ray.remote(num_cpus=1, max_retries=3)(_convert_remote)
        pending = [convert.remote(shared, number) for number in range(len(job.units))]
        totals_3 = np.zeros(3, np.int64)
        while pending:
            finished, pending = ray.wait(pending, num_returns=1, timeout=_TICK_S)
            for reference in finished:
                record = _ray_result(reference)
                totals_3 += (record.num_samples, int(record.records_N["size"].astype(np.int64).sum()), len(record.skipped))
                on_progress(*totals_3.tolist())
                yield record
    finally:
        # Waited for: what still writes when we are gone would write beside the next run.
        for reference in pending:
            ray.cancel(reference)
        if pending:
            ray.wait(pending, num_returns=len(pending), timeout=_FAREWELL_S)
        if started:
            ray.shutdown()


def _join_cluster(address: str) -> None:
    """Connects to the cluster at `address`, or starts one of this machine for "local".

    Raises:
        BackendError: nobody answers there, or Ray refuses.
    """
    import ray

    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if host and port.isdecimal():
            # Ray itself would try for minutes, and then end the process.
            socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
        ray.init(address=address, log_to_driver=False, configure_logging=False, include_dashboard=False)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        raise BackendError(
            f"no Ray cluster at {address} ({_first_line(error)}): start one with 'ray start --head' and name it in RAY_ADDRESS "
            "(one that asks for a token needs RAY_AUTH_MODE=token as well), or leave --executor out"
        ) from error


def _ray_result(reference: Any) -> UnitRecord:
    """The record of a task that ended.

    Raises:
        DatasetError, ShardError, OSError: what the task failed with, or that the cluster lost it.
        BackendError: a worker lacks this project or one of its packages.
    """
    import ray

    try:
        record: UnitRecord = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ray.exceptions.RaySystemError):  # it could not even read its task
            raise BackendError(
                f"a Ray worker cannot take its task ({_first_line(error.cause)}): install this project, in this version, on every node"
            ) from None
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ShardError(f"the Ray cluster lost a task ({_first_line(error)}): continue with --resume") from None
    return record


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _convert_remote(job: Job, number: int) -> UnitRecord:
    return convert_unit(job.samples, job.units[number], job.store, Tally())
