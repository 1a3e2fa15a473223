"""A DALI pipeline whose iterations are scheduled by hand, so that a stream can start and stop anywhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

import torch

from pipelines.loaders.dali_package import Pipeline
from pipelines.types import UserError

Feed = dict[str, Any]
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def new_pipeline(max_samples: int, device: torch.device, num_threads: int, prefetch_batches: int) -> Any:
    """An empty DALI pipeline on `device`."""
    return Pipeline(
        batch_size=max_samples,
        num_threads=num_threads,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        prefetch_queue_depth=prefetch_batches,
        exec_dynamic=True,
    )


class ScheduledPipeline(Generic[ItemT, ResultT]):
    """Runs items through a pipeline that is fed by `external_source` operators.

    Args:
        define: makes and builds the pipeline; called anew after a failure, because DALI gives a pipeline up then.
        depth: iterations in flight; the pipeline's `prefetch_queue_depth`.
        tiny: one small batch, input name → batch, that every new pipeline is started with.
        take: the result of an iteration from the pipeline's outputs, before DALI may use them again.
        explain: the user's error for DALI's, given the items in flight.
    """

    def __init__(
        self,
        define: Callable[[], Any],
        *,
        depth: int,
        device: torch.device,
        tiny: Feed,
        take: Callable[[tuple[Any, ...]], ResultT],
        explain: Callable[[RuntimeError, list[ItemT]], UserError],
    ) -> None:
        """Builds the pipeline and runs it once on the tiny batch."""
        self._define, self._depth, self._device, self._tiny = define, depth, device, tiny
        self._take, self._explain = take, explain
        self._pipeline: Any = self._primed()

    def run(self, items: Iterator[tuple[ItemT, Feed]]) -> Generator[tuple[ItemT, ResultT], None, None]:
        """Yields each item with its result, in order; keeps `depth` iterations in flight, also while the caller works on a result."""
        if self._pipeline is None:
            self._pipeline = self._primed()
        in_flight: deque[tuple[ItemT, Feed]] = deque()  # feeds are kept: DALI reads them without a copy
        try:
            for item, feed in items:
                ready = self._collect(in_flight) if len(in_flight) == self._depth else None
                _schedule(self._pipeline, feed)
                in_flight.append((item, feed))
                if ready is not None:
                    yield ready
            while in_flight:
                yield self._collect(in_flight)
        finally:
            self._abandon(len(in_flight))

    def _collect(self, in_flight: deque[tuple[ItemT, Feed]]) -> tuple[ItemT, ResultT]:
        device = self._device
        try:
            outputs = self._pipeline.share_outputs(torch.cuda.current_stream(device) if device.type == "cuda" else None)
        except RuntimeError as error:
            self._pipeline = None
            try:
                raise self._explain(error, [item for item, _ in in_flight]) from error
            finally:
                in_flight.clear()  # not before: the feeds keep alive what the explanation looks at
        result = self._take(outputs)
        self._pipeline.release_outputs()
        return in_flight.popleft()[0], result

    def _abandon(self, count: int) -> None:
        """Takes what is in flight out of the pipeline; a failure there is nobody's any more and only costs the pipeline."""
        try:
            for _ in range(count):
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()
        except (RuntimeError, StopIteration):  # the latter where an interrupt fell between the two calls of an iteration
            self._pipeline = None

    def _primed(self) -> Any:
        """A built pipeline of which every later `schedule_run` starts exactly one iteration.

        DALI's first one starts `prefetch_queue_depth` iterations at once and fails if fewer were fed, so that many tiny batches go first.
        """
        pipeline = self._define()
        for _ in range(self._depth - 1):
            _feed(pipeline, self._tiny)
        _schedule(pipeline, self._tiny)
        for _ in range(self._depth):
            pipeline.share_outputs()
            pipeline.release_outputs()
        return pipeline

    def close(self) -> None:
        """Frees DALI's threads and buffers."""
        self._pipeline = None


def _feed(pipeline: Any, feed: Feed) -> None:
    for name, batch in feed.items():
        pipeline.feed_input(name, batch)


def _schedule(pipeline: Any, feed: Feed) -> None:
    _feed(pipeline, feed)
    pipeline.schedule_run()
