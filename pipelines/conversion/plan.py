"""What a conversion will write, settled before it starts: any process on any machine that makes the same plan writes the same shards.

A unit of work is one shard: a range of positions in the write order of its split. How many samples a shard takes is estimated once from a
few of them, so that ranges need no knowledge of the bytes before them; a resumed or divided conversion adopts the stored estimate.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from pipelines.format.encoding import PixelOptions, prepare_sample
from pipelines.format.index import shard_file
from pipelines.format.tar import tar_bytes
from pipelines.types import SPLITS, DatasetError, EncodedSample, IntArray, JsonValue, OpenDataset, ShardError

PLAN_FILE = "plan.json"
_PROBED = 128  # samples looked at per split
_UNKNOWN_BYTES = 100_000  # where no probed sample can be read; validation will say so soon enough
# What the keys of a plan are to somebody who types a command.
_READABLE = {
    "options": "the options of the data set or the seed",
    "pixels": "what happens to images",
    "shard_bytes": "shard_bytes",
    "extras": "the formats or resampled streams",
    "num_samples": "the number of images",
    "source_sha256": "the images or their order",
}


@dataclass(frozen=True)
class Unit:
    """Shard `number` of `split`: positions start … stop−1 of its write order."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its record: 'train-000003'."""
        return shard_file(self.split, self.number).removesuffix(".tar")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """From the probe, per split: mean bytes of a sample in a tar, and seconds one process spends on it."""

    sample_bytes: Mapping[str, float]
    sample_s: Mapping[str, float]

    def total(self, num_samples: Mapping[str, int]) -> tuple[int, float]:
        """Bytes and single-process seconds of the whole conversion."""
        num_bytes = sum(num * self.sample_bytes[split] for split, num in num_samples.items())
        return int(num_bytes), sum(num * self.sample_s[split] for split, num in num_samples.items())


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """Everything that decides the bytes written.

    Args:
        dataset, options, class_names: of the opened data set.
        pixels: `PixelOptions.recorded`.
        shard_bytes: what a shard is meant to hold, about.
        extras: what is made from the finished shards: resampled streams and other formats.
        num_samples: of each split's write order.
        source_sha256: of the order, the labels and the names of all samples.
        samples_per_shard: of each split, estimated; empty until `sized`.
    """

    dataset: str
    options: Mapping[str, JsonValue]
    class_names: tuple[str, ...]
    pixels: Mapping[str, JsonValue]
    shard_bytes: int
    extras: Mapping[str, JsonValue]
    num_samples: Mapping[str, int]
    source_sha256: str
    samples_per_shard: Mapping[str, int]

    def units(self) -> list[Unit]:
        """All shards of all splits, in order."""
        splits = [split for split in SPLITS if split in self.num_samples]  # a stored plan has them in another order
        return [unit for split in splits for unit in split_units(split, self.num_samples[split], self.samples_per_shard[split])]

    def sized(self, estimate: Estimate) -> ConversionPlan:
        """With as many samples a shard as make up `shard_bytes` by `estimate`."""
        sizes = {split: max(1, round(self.shard_bytes / estimate.sample_bytes[split])) for split in self.num_samples}
        return replace(self, samples_per_shard=sizes)

    def sha256(self) -> str:
        """Hex; what an earlier run left belongs to this plan only where it has the same."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        """UTF-8 JSON with sorted keys."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, content: bytes, where: str) -> ConversionPlan:
        """Reads a stored plan.

        Raises:
            ShardError: it is damaged or of another program version.
        """
        try:
            stored: dict[str, Any] = json.loads(content)
            return cls(**{**stored, "class_names": tuple(stored["class_names"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ShardError(f"{where} is damaged or of another version ({error}): start over with --overwrite") from None

    def adopt(self, stored: ConversionPlan, where: str) -> ConversionPlan:
        """`stored`, if it differs from this plan in the estimate at most.

        Raises:
            ShardError: the unfinished conversion has other options or images; names what differs.
        """
        mine, theirs = json.loads(self.to_json()), json.loads(stored.to_json())
        different = [key for key in mine if key != "samples_per_shard" and mine[key] != theirs[key]]
        if different:
            names = ", ".join(_READABLE.get(key, key) for key in different)
            raise ShardError(
                f"the unfinished conversion at {where} was started with other settings ({names} differ): repeat the command with the "
                "settings it had, or start over with --overwrite alone (of parts: after removing it)"
            )
        return stored


def split_units(split: str, num_samples: int, samples_per_shard: int) -> list[Unit]:
    """`num_samples` positions in ranges of `samples_per_shard`; the last one is shorter."""
    starts = range(0, num_samples, samples_per_shard)
    return [Unit(split, number, start, min(start + samples_per_shard, num_samples)) for number, start in enumerate(starts)]


def source_sha256(dataset: OpenDataset, orders: Mapping[str, IntArray]) -> str:
    """Identity of what is converted, without reading an image: order, labels and names of every sample."""
    digest = hashlib.sha256()
    for split, order_N in orders.items():
        source = dataset.splits[split]
        digest.update(f"{split} {len(order_N)}\n".encode())
        digest.update(np.ascontiguousarray(order_N, "<i8").tobytes())
        digest.update(np.ascontiguousarray(source.labels_N, "<i8").tobytes())
        digest.update("\0".join(source.sources).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def probe(dataset: OpenDataset, orders: Mapping[str, IntArray], pixels: PixelOptions) -> Estimate:
    """Converts a few evenly spaced samples of each split (of a stream: its first ones) and throws them away."""
    sample_bytes, sample_s = {}, {}
    streamed = _first_streamed(dataset) if dataset.stream else None
    for split, order_N in orders.items():
        positions: IntArray = np.unique(np.linspace(0, len(order_N) - 1, _PROBED).astype(np.int64)) if len(order_N) else order_N
        sizes, started_s = [], time.perf_counter()
        for position in positions:
            try:
                sample = streamed[position % len(streamed)] if streamed else dataset.splits[split].read(int(order_N[position]))
                sizes.append(tar_bytes(len(prepare_sample(sample, pixels).sample.encoded)))
            except DatasetError:
                continue
        sample_s[split] = (time.perf_counter() - started_s) / max(1, len(sizes))
        sample_bytes[split] = float(np.mean(sizes)) if sizes else float(_UNKNOWN_BYTES)
    return Estimate(sample_bytes=sample_bytes, sample_s=sample_s)


def _first_streamed(dataset: OpenDataset) -> list[EncodedSample]:
    assert dataset.stream is not None
    samples = dataset.stream()
    try:
        return [sample for _, _, sample in islice(samples, _PROBED)]
    finally:
        getattr(samples, "close", lambda: None)()


def make_plan(
    dataset: OpenDataset,
    orders: Mapping[str, IntArray],
    pixels: PixelOptions,
    shard_bytes: int,
    extras: Mapping[str, JsonValue],
) -> ConversionPlan:
    """The plan of converting `dataset` in `orders` (per split, int64 [N]); still to be `sized`, or compared with a stored one."""
    return ConversionPlan(
        dataset=dataset.name,
        options=dict(dataset.options),
        class_names=dataset.class_names,
        pixels=pixels.recorded(),
        shard_bytes=shard_bytes,
        extras=dict(extras),
        num_samples={split: len(order_N) for split, order_N in orders.items()},
        source_sha256=source_sha256(dataset, orders),
        samples_per_shard={},
    )
