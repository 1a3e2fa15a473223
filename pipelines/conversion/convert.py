"""The whole conversion, and its last step alone for one that was divided into parts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from pipelines.config import require, require_choice
from pipelines.conversion.beton import require_ffcv
from pipelines.conversion.executors import ExecutorOptions, Job, run_units
from pipelines.conversion.finish import FORMATS, OnProgress, WriteReport, write_extras, write_manifest
from pipelines.conversion.plan import ConversionPlan, Estimate, Unit, make_plan, probe
from pipelines.conversion.resampling import Resampling
from pipelines.conversion.site import Site
from pipelines.conversion.spool import SpooledSamples, spool
from pipelines.conversion.unit import Samples, SourceSamples, UnitRecord, require_records, stored_record
from pipelines.format.encoding import PixelOptions
from pipelines.store import free_bytes
from pipelines.types import SPLITS, DatasetError, IntArray, OpenDataset, ShardError

_SPOOLED = "archive"  # the stage in which a streamed source is read


def _silent(stage: str, total: int, images: int, num_bytes: int, skipped: int) -> None:
    """No progress."""


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How shards are written.

    Args:
        shard_bytes: what a shard holds, about: its number of samples is set once, from the mean size of a few.
        pixels: what happens to images.
        on_error: "stop" at the first image that does not decode, or "skip" it and count it.
        formats: "wds" always, "ffcv" beside it.
        resamplings: streams of the training split to add.
        overwrite: replace an existing output folder, or what an unfinished conversion left.
        resume: continue an unfinished conversion; without one, begin. With `overwrite`, both: the old shards stay until the new are whole.
        part: (i, n): convert every n-th unit only, 1 ≤ i ≤ n; `merge_parts` completes the folder. Parts always resume.
        executor: whose hands.
        num_threads: of each process; None: 1, or more where there are fewer units than processes.
    """

    shard_bytes: int = 256 << 20
    pixels: PixelOptions = field(default_factory=PixelOptions)
    on_error: str = "stop"
    formats: tuple[str, ...] = ("wds",)
    resamplings: tuple[Resampling, ...] = ()
    overwrite: bool = False
    resume: bool = False
    part: tuple[int, int] | None = None
    executor: ExecutorOptions = field(default_factory=ExecutorOptions)
    num_threads: int | None = None

    def __post_init__(self) -> None:
        require(self.shard_bytes >= 1024, f"shard_bytes must be at least 1024, not {self.shard_bytes}")
        require_choice("on_error", self.on_error, ("stop", "skip"))
        for name in self.formats:
            require_choice("format", name, FORMATS)
        require("wds" in self.formats, "the beton is copied from the tars and shares their index: ask for wds,ffcv")
        names = [resampling.name for resampling in self.resamplings]
        twice = max(names, key=names.count, default="")
        require(names.count(twice) <= 1, f"two resampled streams would be called '{twice}': drop one")
        require(self.num_threads is None or self.num_threads >= 1, f"threads must be at least 1, not {self.num_threads}")
        if self.part is not None:
            number, parts = self.part
            require(1 <= number <= parts, f"part {number}/{parts} does not exist: parts are numbered 1/{parts} to {parts}/{parts}")

    def extras(self) -> dict[str, Any]:
        """What is made from the finished shards, for the plan."""
        return {"formats": sorted(self.formats), "resamplings": [vars(resampling) for resampling in self.resamplings]}


def estimate_work(dataset: OpenDataset, orders: Mapping[str, IntArray], options: WriteOptions) -> tuple[Estimate, int]:
    """What to expect, from converting a few samples of each split, and the bytes of all files together, extras included."""
    estimate = probe(dataset, orders, options.pixels)
    return estimate, _needed_bytes(estimate, {split: len(order_N) for split, order_N in orders.items()}, options)


def _needed_bytes(estimate: Estimate, num_samples: Mapping[str, int], options: WriteOptions) -> int:
    needed, _ = estimate.total(num_samples)
    if "ffcv" in options.formats:
        needed *= 2
    for resampling in options.resamplings:
        if resampling.materialised:
            needed += int((resampling.epoch_size or num_samples["train"]) * estimate.sample_bytes["train"])
    return needed


def write_shards(
    dataset: OpenDataset,
    orders: Mapping[str, IntArray],
    out: Path | str,
    options: WriteOptions,
    on_progress: OnProgress = _silent,
) -> WriteReport | None:
    """Writes every split of `dataset` to the folder or URL `out`; None where a part was asked for and others, or the merge, are to come.

    Args:
        dataset: where samples come from.
        orders: per split, int64 [N], the order in which its samples are written; no sample twice.
        out: final place; its parent folder is made if missing.
        options: what, how, by whom.
        on_progress: called with (stage, samples in all, samples done, bytes done, samples skipped) while a stage runs.

    Raises:
        ShardError: `out` exists, another run is writing it, the disk is full or read-only, or what is to be resumed is another conversion.
        DatasetError: an image does not decode and `on_error` is "stop"; names the file. Finished shards stay for `resume`.
        BackendError: FFCV, Ray, its cluster or the package of a store is missing.
    """
    site = Site(str(out))
    _require_local(site, dataset, options)
    if "ffcv" in options.formats:
        require_ffcv()  # now, not after hours of work
    part = "" if options.part is None else f".part-{options.part[0]}-of-{options.part[1]}"
    try:
        with site.locked(part):
            divided = options.part is not None
            prepared = site.prepare(resume=options.resume or divided, overwrite=options.overwrite, part=divided)
            complete = site.complete_partial() if prepared else site.finished_manifest()
            if complete is not None:
                _require_same(site, complete, dataset, orders, options)
                if prepared and divided:
                    return None  # `merge_parts` was killed at its last step and will take it up
                if prepared:
                    site.publish()
                return WriteReport.of_manifest(complete)
            plan = _settled_plan(site, dataset, orders, options)
            number, parts = options.part or (1, 1)
            mine = plan.units()[number - 1 :: parts]
            records = _convert(site, plan, mine, _source(dataset, orders, options, len(mine)), options, part, on_progress)
            if options.part is not None:
                return None
            return _complete(site, plan, records, options.executor, on_progress)
    except OSError as error:
        raise _write_failure(site, error) from error


def merge_parts(out: Path | str, executor: ExecutorOptions | None = None, on_progress: OnProgress = _silent) -> WriteReport:
    """Completes the folder `out` whose units were converted in parts.

    Raises:
        ShardError: there are no parts, or units are missing; says how many.
    """
    site = Site(str(out))
    try:
        with site.locked(""):
            complete = site.complete_partial()
            if complete is not None:
                site.publish()
                return WriteReport.of_manifest(complete)
            plan = site.stored_plan()
            if plan is None:
                finished = site.finished_manifest()
                if finished is not None:
                    return WriteReport.of_manifest(finished)
                raise ShardError(f"there are no parts to merge at {site.store.location}: convert them with --part 1/N … --part N/N first")
            records = {unit.name: record for unit in plan.units() if (record := stored_record(site.store, unit))}
            return _complete(site, plan, records, executor or ExecutorOptions(), on_progress)
    except OSError as error:
        raise _write_failure(site, error) from error


def _write_failure(site: Site, error: OSError) -> ShardError:
    reason = error.strerror or str(error)
    kept = site.folder is None or site.folder.is_dir()
    waits = f", and what is finished waits at {site.store.location} for --resume" if kept else ""
    return ShardError(f"cannot write shards to {site.out}: {reason}; nothing was left under that name{waits}")


def _require_local(site: Site, dataset: OpenDataset, options: WriteOptions) -> None:
    """Betons and resampled streams are made from finished tars, which must be at hand, and tars from spool files that all workers see."""
    if site.folder is not None:
        return
    if "ffcv" in options.formats or options.resamplings:
        raise ShardError(f"FFCV files and resampled streams are made from local shards, not at {site.out}: use a local --out and copy it")
    if dataset.stream and options.executor.executor == "ray":
        raise ShardError(
            f"a compressed archive is taken apart on this machine, where a cluster does not see it while --out is {site.out}: "
            "use an --out on a shared disk and copy it, or leave --executor out"
        )


def _require_same(
    site: Site, manifest: dict[str, Any], dataset: OpenDataset, orders: Mapping[str, IntArray], options: WriteOptions
) -> None:
    """Raises `ShardError` where what is complete was not made by this command, so that resuming would be to ignore what it asks for."""
    wanted = {
        "the data set": dataset.name,
        "its options or the seed": dict(dataset.options),
        "the classes": list(dataset.class_names),
        "what happens to images": options.pixels.recorded(),
        "the number of images": sum(len(order_N) for order_N in orders.values()),
        "the formats": "ffcv" in options.formats,
        "the resampled streams": sorted([stream.name, stream.seed, stream.materialised] for stream in options.resamplings),
    }
    splits, streams = manifest["splits"].values(), manifest.get("resampled", [])
    found = [
        manifest["dataset"],
        manifest.get("options"),
        manifest["class_names"],
        manifest.get("pixels"),
        sum(entry["num_samples"] for entry in splits) + manifest.get("num_skipped", 0),
        any("beton" in entry for entry in splits),
        sorted([stream["name"], stream["seed"], stream["materialised"]] for stream in streams),
    ]
    different = [name for name, each in zip(wanted, found, strict=True) if json.loads(json.dumps(wanted[name])) != each]
    if different:
        raise ShardError(
            f"{site.out} is complete, but was made with other settings ({', '.join(different)} differ): "
            "add --overwrite to replace it or choose another --out"
        )


def _settled_plan(site: Site, dataset: OpenDataset, orders: Mapping[str, IntArray], options: WriteOptions) -> ConversionPlan:
    """The stored plan where it fits, or a new one, stored."""
    plan = make_plan(dataset, orders, options.pixels, options.shard_bytes, options.extras())
    stored = site.stored_plan()
    if stored is None:
        estimate = probe(dataset, orders, options.pixels)
        _require_space(site, dataset, estimate, plan, options)
        stored = site.settle(plan.sized(estimate))
    return plan.adopt(stored, site.store.location)


def _require_space(site: Site, dataset: OpenDataset, estimate: Estimate, plan: ConversionPlan, options: WriteOptions) -> None:
    needed = _needed_bytes(estimate, plan.num_samples, options)
    # A remote store does not say how much it holds, but samples of a stream are laid down here first.
    place = site.out if site.folder is not None else gettempdir() if dataset.stream else None
    free = free_bytes(place) if place is not None else None
    if free is not None and needed > free:
        raise ShardError(
            f"the shards need about {needed / 1e9:.3g} GB and {place} has {free / 1e9:.3g} GB free: "
            "make room, choose another --out, or shrink images with --min-side"
        )


def _source(dataset: OpenDataset, orders: Mapping[str, IntArray], options: WriteOptions, num_units: int) -> SourceSamples:
    # One reader thread reads ahead where the source is slow; more only where units are too few to keep every core busy.
    processes = options.executor.num_processes
    idle = processes if dataset.stream else math.ceil(processes / max(1, min(processes, num_units)))
    return SourceSamples(
        dataset=dataset,
        orders=orders,
        pixels=options.pixels,
        on_error=options.on_error,
        num_threads=options.num_threads or idle,
    )


def _convert(
    site: Site,
    plan: ConversionPlan,
    units: list[Unit],
    source: SourceSamples,
    options: WriteOptions,
    part: str,
    on_progress: OnProgress,
) -> dict[str, UnitRecord]:
    """Converts the units that no earlier run finished; returns the record of each."""
    records = {unit.name: record for unit in units if (record := stored_record(site.store, unit))}
    left = [unit for unit in units if unit.name not in records]
    total = sum(unit.stop - unit.start for unit in units)
    images = sum(record.num_samples for record in records.values())
    skipped = sum(len(record.skipped) for record in records.values())
    samples: Samples = source
    folder = site.spool_folder(part)
    if source.dataset.stream and left:
        samples = SpooledSamples(folder=folder)
        spool(source, left, folder, plan.sha256(), lambda num, size: on_progress(_SPOOLED, total, images + skipped + num, size, 0))
    job = Job(samples=samples, units=left, store=site.store)

    def on_shards(done: int, num_bytes: int, lost: int) -> None:
        on_progress("shards", total, images + done, num_bytes, skipped + lost)

    for record in run_units(job, options.executor, on_shards):
        records[record.name] = record
        if source.dataset.stream:
            (folder / record.name).unlink(missing_ok=True)
    if source.dataset.stream:
        shutil.rmtree(folder, ignore_errors=True)
    return records


def _complete(
    site: Site, plan: ConversionPlan, records: dict[str, UnitRecord], executor: ExecutorOptions, on_progress: OnProgress
) -> WriteReport:
    units = plan.units()
    require_records(records, units, site.store.location)
    by_split = {split: [records[unit.name] for unit in units if unit.split == split] for split in SPLITS}

    def extras(manifest: dict[str, Any]) -> None:
        if site.folder is not None:
            write_extras(plan, site.folder, site.store, manifest, executor, on_progress)

    try:
        report = write_manifest(plan, site.store, by_split, extras)
    except DatasetError:  # there is nothing to resume
        site.clear()
        raise
    site.publish()
    return report
