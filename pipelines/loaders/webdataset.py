"""Loader `webdataset`: shards streamed from a web server, an object store or a folder, for sets larger than the local disk.

Whole shards come into memory ahead of their use, in an order that suits them (`BlockOrder`); images are views into them by the index's
offsets, so no tar is parsed. DALI decodes as in loader `dali`. Evaluation takes samples by id, as every loader does; there each rank
downloads every shard.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from weakref import WeakValueDictionary

import numpy as np
import torch

from pipelines.format import ShardSplit
from pipelines.format.origin import ByteArray, Ending
from pipelines.loaders.block_order import BlockOrder, ShardUse
from pipelines.loaders.dali_decoder import DaliDecoder
from pipelines.loaders.damage import SampleGuard
from pipelines.loaders.plan import BatchPlan, train_plans
from pipelines.loaders.planned import PixelRequest, split_geometry, stand_ins
from pipelines.loaders.shard_fetcher import LostShardError, PatientReader, ShardFetcher
from pipelines.types import ConfigError, DamagedSampleError, IntArray, ShardError

_LOG = logging.getLogger(__name__)


class FetchedSplit(ShardSplit):
    """A split whose images lie in shards that were fetched; of a shard that is not here, single images are read."""

    def __init__(self, split: ShardSplit) -> None:
        """Shares the arrays of `split`; nothing is here yet."""
        vars(self).update(vars(split))
        self._where = split
        # Weak: DALI's feeds keep the images they need alive, and explaining a failure needs no others.
        self._here: WeakValueDictionary[int, ByteArray] = WeakValueDictionary()
        self._tars = self._here
        self._single: WeakValueDictionary[int, ByteArray] = WeakValueDictionary()
        self._reader: PatientReader | None = None
        self._patience_s = 0.0

    def begin(self, reader: PatientReader, patience_s: float) -> None:
        """Single images come through `reader`, which tries for `patience_s` seconds, from now on."""
        self._reader, self._patience_s = reader, patience_s

    def hold(self, shard: int, tar: ByteArray) -> None:
        """Images of `shard` are taken from these bytes, for as long as somebody keeps them."""
        self._here[shard] = tar

    def encoded(self, ids: IntArray) -> list[ByteArray]:
        """The encoded images of `ids`, uint8 views into what is here, for as long as somebody keeps them.

        Raises:
            LostShardError: one must be read alone, and its shard is not there.
            ShardError: the same, because the server does not answer.
        """
        tars = {shard: self._here.get(shard) for shard in np.unique(self.shards_N[ids]).tolist()}
        rows = zip(ids.tolist(), self.shards_N[ids].tolist(), self.offsets_N[ids].tolist(), self.sizes_N[ids].tolist(), strict=True)
        images = []
        for sample_id, shard, start, size in rows:
            tar = tars[shard]
            images.append(self._read_single(sample_id) if tar is None else tar[start : start + size])
        return images

    def addresses(self, ids: IntArray) -> IntArray:
        """Where the encoded images of `ids`, which `encoded` gave and somebody keeps, lie in this process's memory, int64 [S]."""
        shards, places_S = np.unique(self.shards_N[ids], return_inverse=True)
        tars = [self._here.get(shard) for shard in shards.tolist()]
        bases = np.array([0 if tar is None else tar.ctypes.data for tar in tars], np.int64)
        found: IntArray = bases[places_S] + self.offsets_N[ids].astype(np.int64)
        for row in np.flatnonzero(bases[places_S] == 0):
            found[row] = self._read_single(int(ids[row])).ctypes.data
        return found

    def shrunken(self, ids: IntArray) -> IntArray:
        """None: what is in memory stays as it came."""
        return ids[:0]

    def _read_single(self, sample_id: int) -> ByteArray:
        image = self._single.get(sample_id)
        if image is None:
            assert self._reader is not None, "images are asked for while a stream is open"
            image = np.empty(int(self.sizes_N[sample_id]), np.uint8)
            number = int(self.shards_N[sample_id])
            shard = self.entry["shards"][number]
            started_s = time.monotonic()
            try:
                self._reader.read(shard["file"], int(self.offsets_N[sample_id]), image, shard["shard_bytes"])
            except ShardError as error:
                if time.monotonic() - started_s >= self._patience_s:
                    raise  # its server is gone, and with it the other shards: to lose them one by one would take for ever
                raise LostShardError(str(error), number) from error
            self._single[sample_id] = image
        return image

    def _place(self, shard: int) -> str:
        return self._where._place(shard)


class WebdatasetPixels:
    """Pixel source `webdataset`.

    Attributes:
        order: in training the order of whole shards, in evaluation None.
        fetcher: of the stream that is open or was last; it knows how much memory shards take.
    """

    stored_sizes = None

    def __init__(self, request: PixelRequest) -> None:
        """Builds the pipeline; nothing is fetched before the first plan.

        Raises:
            ConfigError: more ranks than shards, or a buffer that holds less than two shards.
        """
        config, split = request.config, request.split
        buffer_bytes, largest_bytes = config.stream.buffer_bytes, int(split.shard_bytes.max())
        if buffer_bytes < 2 * largest_bytes:
            raise ConfigError(
                f"data.stream.buffer_bytes={buffer_bytes} holds less than two shards of {largest_bytes} bytes, one in use and one on its "
                f"way: add --set data.stream.buffer_bytes={2 * largest_bytes}"
            )
        self.order: BlockOrder | None = None
        if request.training:
            self.order = BlockOrder(
                split,
                len(request.shards.class_names),
                batch_size=config.batch_size,
                seed=request.seed,
                config=config.order,
                world_size=request.world_size,
                window_bytes=buffer_bytes // 2,
            )
        self._split = FetchedSplit(split)
        self._request = replace(request, split=self._split)
        self._guard, self._decoder = SampleGuard(self._split), DaliDecoder(self._request)
        self._geometry = split_geometry(split, config.image_size)
        self._lost: frozenset[int] = frozenset()
        self._damaged_N = np.zeros(len(split), np.bool_)
        self._without: tuple[BlockOrder, IntArray] | None = None  # the order without what is lost, and who stands in for damaged samples
        self.fetcher: ShardFetcher | None = None

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """Fetches the shards from the first plan's on, and keeps `prefetch_batches` iterations of DALI in flight.

        Raises:
            DamagedSampleError: samples do not decode.
            ShardError: a shard cannot be had, and `on_error` is "stop", or this is evaluation.
        """
        try:
            with closing(self._fetched(plans)) as items:
                yield from self._decoder.stream(items)
        except DamagedSampleError as error:
            # The plans to come avoid these samples; what stands in for lost ones must as well.
            self._damaged_N[error.ids] = True
            self._without = None
            raise

    def _fetched(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, list[ByteArray]], None, None]:
        plans, uses = self._uses(plans)
        stream = self._request.config.stream
        reader = PatientReader(self._request.shards.origin, stream.patience_s, Ending())
        self._split.begin(reader, stream.patience_s)
        self.fetcher = fetcher = ShardFetcher(reader, self._split, uses, stream.buffer_bytes)
        try:
            for planned in plans:
                fetcher.release_before(planned.step)
                plan, encoded = self._here(planned, fetcher)
                self._guard.require_whole(plan.ids_S)
                yield plan, encoded
                del encoded
        finally:
            fetcher.close()

    def _uses(self, plans: Iterator[BatchPlan]) -> tuple[Iterator[BatchPlan], list[ShardUse]]:
        """The plans, and the shards they need: known from the order in training, and from the plans themselves in evaluation."""
        request = self._request
        if self.order is None:
            listed = list(plans)
            steps: dict[int, list[int]] = {}
            for plan in listed:
                for shard in np.unique(self._split.shards_N[plan.ids_S]).tolist():
                    steps.setdefault(shard, []).append(plan.step)
            return iter(listed), [ShardUse(shard, found[0], found[-1]) for shard, found in steps.items()]
        first = next(plans, None)
        if first is None:
            return iter(()), []
        uses = self.order.uses(first.epoch, request.rank, first.step)
        return _chain(first, plans), [use for use in uses if use.shard not in self._lost]

    def _here(self, plan: BatchPlan, fetcher: ShardFetcher) -> tuple[BatchPlan, list[ByteArray]]:
        """The plan and its encoded images, once they are here; where a shard is lost and that is allowed, with others in their place."""
        while True:
            plan = self._without_lost(plan)
            try:
                tars = {shard: fetcher.get(shard, plan.step) for shard in np.unique(self._split.shards_N[plan.ids_S]).tolist()}
                for shard, tar in tars.items():
                    if tar is not None:
                        self._split.hold(shard, tar)
                return plan, self._split.encoded(plan.ids_S)
            except LostShardError as error:
                if not self._request.training:
                    raise
                if self._request.config.on_error == "stop":
                    raise ShardError(f"{error}, or train without it: --set data.on_error=skip") from error
                self._lost |= {error.shard}
                self._without = None
                _LOG.warning("%s; training goes on without its samples", error)

    def _without_lost(self, plan: BatchPlan) -> BatchPlan:
        """`plan` with the samples of lost shards replaced as the order without them says, their crops drawn anew."""
        lost_S = np.isin(self._split.shards_N[plan.ids_S], list(self._lost))
        if self.order is None or not lost_S.any():
            return plan
        request = self._request
        if self._without is None:
            self._without = self.order.without(self._lost), self._stand_ins()
        order, stand_ins_N = self._without
        augment, rank, world_size = request.config.augment, request.rank, request.world_size
        other = next(train_plans(order, self._geometry, augment, plan.epoch, plan.step, rank, world_size, stand_ins_N))
        return replace(
            plan,
            ids_S=np.where(lost_S, other.ids_S, plan.ids_S),
            windows_S4=np.where(lost_S[:, None], other.windows_S4, plan.windows_S4),
            flips_S=np.where(lost_S, other.flips_S, plan.flips_S),
        )

    def _stand_ins(self) -> IntArray:
        """int64 [N]: for each damaged sample one that is whole and can be had, of its class where that has one."""
        usable_N = ~self._damaged_N & ~np.isin(self._split.shards_N, list(self._lost))
        if not usable_N.any():
            raise ShardError(f"every sample of '{self._split.name}' is damaged or in a lost shard: copy its shards there again")
        stand_ins_N = stand_ins(self._split.labels_N, self._damaged_N, usable_N)
        usable, alone = np.flatnonzero(usable_N), np.flatnonzero(stand_ins_N < 0)
        stand_ins_N[alone] = usable[np.searchsorted(usable, alone) % len(usable)]
        return stand_ins_N

    def close(self) -> None:
        """Frees DALI's threads and buffers."""
        self._decoder.close()


def _chain(first: BatchPlan, others: Iterator[BatchPlan]) -> Iterator[BatchPlan]:
    yield first
    yield from others
