"""The whole conversion, and its last step alone for one that was divided into parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.config import require, require_choice
from pipelines.conversion.beton import require_ffcv
from pipelines.conversion.executors import ExecutorOptions, Job, run_units
from pipelines.conversion.finish import FORMATS, OnProgress, WriteReport, write_extras, write_manifest
from pipelines.conversion.plan import PLAN_FILE, ConversionPlan, Estimate, Unit, make_plan, probe
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
        resume: continue an unfinished conversion; without one, begin.
        part: (i, n): convert every n-th unit only, 1 ≤ i ≤ n; `merge_parts` completes the folder.
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


def estimate_work(dataset: OpenDataset, orders: Mapping[str, IntArray], options: WriteOptions) -> Estimate:
    """Bytes and seconds to expect, from converting a few samples of each split."""
    return probe(dataset, orders, options.pixels)


def write_shards(
    dataset: OpenDataset,
    orders: Mapping[str, IntArray],
    out: Path | str,
    options: WriteOptions,
    on_progress: OnProgress = _silent,
) -> WriteReport | None:
    """Writes every split of `dataset` to the folder or URL `out`; None where a part was asked for.

    Args:
        dataset: where samples come from.
        orders: per split, int64 [N], the order in which its samples are written; no sample twice.
        out: final place; its parent folder is made if missing.
        options: what, how, by whom.
        on_progress: called with (stage, samples in all, samples done, bytes done, samples skipped) while a stage runs.

    Raises:
        ShardError: `out` exists, another run is writing it, the disk is full or read-only, or what is to be resumed is another conversion.
        DatasetError: an image does not decode and `on_error` is "stop"; names the file. Finished shards stay for `resume`.
    """
    site = Site(str(out))
    _require_local(site, options.formats, options.resamplings)
    if "ffcv" in options.formats:
        require_ffcv()  # now, not after hours of work
    part = "" if options.part is None else f".part-{options.part[0]}-of-{options.part[1]}"
    try:
        with site.locked(part):
            if not site.prepare(resume=options.resume or options.part is not None, overwrite=options.overwrite):
                return WriteReport.of_manifest(site.finished_manifest() or {})
            complete = site.complete_partial()
            if complete is not None:
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
    return ShardError(
        f"cannot write shards to {site.out}: {reason}; nothing was left under that name, and what is finished waits at "
        f"{site.store.location} for --resume"
    )


def _require_local(site: Site, formats: tuple[str, ...], resamplings: tuple[Resampling, ...]) -> None:
    """Betons and resampled streams are made from finished tars, which must therefore be at hand."""
    if site.folder is None and ("ffcv" in formats or resamplings):
        raise ShardError(f"FFCV files and resampled streams are made from local shards, not at {site.out}: use a local --out and copy it")


def _settled_plan(site: Site, dataset: OpenDataset, orders: Mapping[str, IntArray], options: WriteOptions) -> ConversionPlan:
    """The stored plan where it fits, or a new one, stored."""
    estimate = probe(dataset, orders, options.pixels)
    plan = make_plan(dataset, orders, options.pixels, options.shard_bytes, options.extras(), estimate)
    stored = site.stored_plan()
    if stored is not None:
        return plan.adopt(stored, site.store.location)
    _require_space(site, estimate, plan, options)
    site.store.write_bytes(PLAN_FILE, plan.to_json())
    # Of parts that start together the last to write wins; all of them read what stands there now.
    return plan.adopt(site.stored_plan() or plan, site.store.location)


def _require_space(site: Site, estimate: Estimate, plan: ConversionPlan, options: WriteOptions) -> None:
    needed, _ = estimate.total(plan.num_samples)
    if "ffcv" in options.formats:
        needed *= 2
    for resampling in options.resamplings:
        if resampling.materialised:
            needed += int((resampling.epoch_size or plan.num_samples["train"]) * estimate.sample_bytes["train"])
    free = free_bytes(site.store.location)
    if free is not None and needed > free:
        raise ShardError(
            f"the shards need about {needed / 1e9:.3g} GB and {site.out} has {free / 1e9:.3g} GB free: "
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
        spooled = [0, 0]

        def on_sample(num_bytes: int) -> None:
            spooled[0] += 1
            spooled[1] += num_bytes
            on_progress(_SPOOLED, total, images + spooled[0], spooled[1], 0)

        spool(source, left, folder, on_sample)
    job = Job(samples=samples, units=left, store=site.store)

    def on_shards(done: int, num_bytes: int, lost: int) -> None:
        on_progress("shards", total, images + done, num_bytes, skipped + lost)

    for record in run_units(job, options.executor, on_shards):
        records[record.name] = record
        if source.dataset.stream:
            (folder / record.name).unlink(missing_ok=True)
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
