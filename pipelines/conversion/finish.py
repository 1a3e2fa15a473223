"""From finished units to a finished folder: indexes, resampled streams, betons and, as the last file, the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.conversion.dali_index import write_virtual
from pipelines.conversion.executors import ExecutorOptions, Job, run_units
from pipelines.conversion.plan import ConversionPlan, Unit, split_units
from pipelines.conversion.resampling import Resampling, resampled_order
from pipelines.conversion.unit import UNIT_FOLDER, Outcome, UnitRecord, stored_record
from pipelines.format.encoding import PreparedSample
from pipelines.format.index import FORMAT_NAME, FORMAT_VERSION, INDEX_DTYPE, MANIFEST_FILE, index_file, manifest_bytes, npy_bytes
from pipelines.format.reader import ShardSplit, read_index
from pipelines.store import Store
from pipelines.types import DatasetError, EncodedSample, IntArray

FORMATS = ("wds", "ffcv")
_MAX_SENTENCES = 1000  # of skipped images in the manifest; all are counted
_JPEG_MAGIC = b"\xff\xd8"

# (stage, samples in all, samples done, bytes done, samples skipped)
OnProgress = Callable[[str, int, int, int, int], None]


@dataclass
class WriteReport:
    """What a shard folder holds: class counts, int64 [K], per split; images re-encoded; the sentence of each skipped image."""

    class_counts: dict[str, IntArray] = field(default_factory=dict)
    num_reencoded: int = 0
    num_skipped: int = 0
    skipped: list[str] = field(default_factory=list)
    resampled: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of_manifest(cls, manifest: dict[str, Any]) -> WriteReport:
        """What `manifest` says."""
        return cls(
            class_counts={split: np.array(entry["class_counts"], np.int64) for split, entry in manifest["splits"].items()},
            num_reencoded=manifest["num_reencoded"],
            num_skipped=manifest["num_skipped"],
            skipped=list(manifest.get("skipped", [])),
            resampled=list(manifest.get("resampled", [])),
        )


def split_entry(store: Store, name: str, records: list[UnitRecord], num_classes: int) -> dict[str, Any]:
    """Writes the index of a split (or of a materialised stream) and returns its manifest entry."""
    filled = [record for record in records if record.num_samples]
    index = np.concatenate([record.records_N for record in filled]) if filled else np.zeros(0, INDEX_DTYPE)
    index["shard"] = np.repeat(np.arange(len(filled)), [record.num_samples for record in filled])
    content = npy_bytes(index)
    store.write_bytes(index_file(name), content)
    shards = [
        {"file": record.file, "num_samples": record.num_samples, "shard_bytes": record.shard_bytes, "sha256": record.sha256}
        for record in filled
    ]
    return {
        "num_samples": len(index),
        "class_counts": np.bincount(index["label"], minlength=num_classes).tolist(),
        "shards": shards,
        "index": {"file": index_file(name), "sha256": hashlib.sha256(content).hexdigest()},
    }


def write_manifest(
    plan: ConversionPlan, store: Store, records: dict[str, list[UnitRecord]], extras: Callable[[dict[str, Any]], None]
) -> WriteReport:
    """Assembles `records` (per split, in order); `extras` may add to the manifest before it is written, last of all.

    Raises:
        DatasetError: not one training image is left.
    """
    entries = {split: split_entry(store, split, done, len(plan.class_names)) for split, done in records.items()}
    if not entries["train"]["num_samples"]:
        raise DatasetError(f"data set '{plan.dataset}' has no readable training image; nothing was written to {store.location}")
    everything = [record for done in records.values() for record in done]
    skipped = [sentence for record in everything for sentence in record.skipped]
    manifest = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "dataset": plan.dataset,
        "options": dict(plan.options),
        "class_names": list(plan.class_names),
        "pixels": dict(plan.pixels),
        "splits": entries,
        "num_reencoded": sum(record.num_reencoded for record in everything),
        "num_skipped": len(skipped),
        "skipped": skipped[:_MAX_SENTENCES],
    }
    extras(manifest)
    store.write_bytes(MANIFEST_FILE, manifest_bytes(manifest))
    return WriteReport.of_manifest(manifest)


@dataclass(frozen=True, kw_only=True)
class _TarSamples:
    """Copies samples from finished shards in a given order, repeats included."""

    folder: Path
    train: dict[str, Any]
    order_E: IntArray

    def __call__(self, unit: Unit) -> Iterator[Outcome]:
        # Mapped anew for every unit: a map that went to a cluster with its job would take all its bytes along.
        split = ShardSplit(self.folder, "train", self.train)
        ids = self.order_E[unit.start : unit.stop]
        for sample_id, view in zip(ids.tolist(), split.encoded(ids), strict=True):
            encoded = view.tobytes()
            extension = "jpg" if encoded.startswith(_JPEG_MAGIC) else "png"
            sample = EncodedSample(encoded=encoded, extension=extension, label=int(split.labels_N[sample_id]), source="")
            yield PreparedSample(sample, int(split.heights_N[sample_id]), int(split.widths_N[sample_id]), False)


def materialise(
    folder: Path,
    store: Store,
    train: dict[str, Any],
    resampling: Resampling,
    samples_per_shard: int,
    executor: ExecutorOptions,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Writes the tars of a resampled training stream from the finished tars in `folder`; returns its entry in `resampled`.

    Units that a killed run finished are taken as they are.
    """
    num_classes = len(train["class_counts"])
    split = ShardSplit(folder, "train", train)
    order_E = resampled_order(split.labels_N, num_classes, resampling)
    name = f"train-{resampling.name}"
    units = split_units(name, len(order_E), samples_per_shard)
    done = {unit.name: record for unit in units if (record := stored_record(store, unit))}
    num_done = sum(record.num_samples for record in done.values())
    samples = _TarSamples(folder=folder, train=train, order_E=order_E)
    job = Job(samples=samples, units=[unit for unit in units if unit.name not in done], store=store)
    for record in run_units(job, executor, lambda images, size, skipped: on_progress(name, len(order_E), num_done + images, size, skipped)):
        done[record.name] = record
    entry = split_entry(store, name, [done[unit.name] for unit in units], num_classes)
    described = resampling.describe(order_E, split.labels_N, num_classes)
    assert entry["class_counts"] == described["class_counts"]
    return {**described, **entry}


def write_extras(
    plan: ConversionPlan, folder: Path, store: Store, manifest: dict[str, Any], executor: ExecutorOptions, on_progress: OnProgress
) -> None:
    """Makes what `plan.extras` asks for from the finished tars in `folder`, and enters it into `manifest`."""
    train = manifest["splits"]["train"]
    streams = [Resampling(**resampling) for resampling in plan.extras["resamplings"]]
    for resampling in streams:
        if resampling.materialised:
            entry = materialise(folder, store, train, resampling, plan.samples_per_shard["train"], executor, on_progress)
        else:
            files = [shard["file"] for shard in train["shards"]]
            entry = write_virtual(folder, "train", read_index(folder, train), files, resampling, len(plan.class_names))
        manifest.setdefault("resampled", []).append(entry)
    if "ffcv" in plan.extras["formats"]:
        betons(folder, store, manifest["splits"], on_progress)


def betons(folder: Path, store: Store, entries: dict[str, Any], on_progress: OnProgress) -> None:
    """Writes `<split>.beton` beside the tars of every split that has samples, and its entry into the split's."""
    from pipelines.conversion.beton import write_beton  # FFCV is optional

    for name, entry in entries.items():
        total = entry["num_samples"]
        if not total:
            continue
        record, stage = f"{UNIT_FOLDER}/{name}.beton.json", f"{name}.beton"
        try:
            entry["beton"] = json.loads(store.read_bytes(record))
            if store.size(f"{name}.beton") == entry["beton"]["beton_bytes"]:
                continue
        except (FileNotFoundError, ValueError, KeyError):
            pass
        num_done = 0

        def on_samples(num: int, stage: str = stage, total: int = total) -> None:
            nonlocal num_done
            num_done += num
            on_progress(stage, total, num_done, 0, 0)

        entry["beton"] = write_beton(ShardSplit(folder, name, entry), folder / f"{name}.beton", on_samples=on_samples)
        store.write_bytes(record, json.dumps(entry["beton"]).encode())
