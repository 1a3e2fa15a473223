"""The verdict over the rows: which one binds, how close training comes to it, and what the two halves cost each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bce3s.throughput.rows import VIEWS_PER_DECODED, Row

READS_TARS = ("dali", "webdataset")
COPIES_PIXELS = ("ffcv",)  # decodes on the host and sends pixels; the others send encoded bytes or keep pixels on the device


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What decides which rows a batch of this run passes through, and which knobs are left to turn.

    Args:
        loader: its name.
        device: "cpu" or "cuda".
        step_key: the row that is the run's own step.
        crop, policy: of the augmentation.
        precision: "bf16", "fp16" or "fp32".
        num_threads: the run's setting, 0 is one per core; of `num_cores` that this process may use.
        streamed: whether the shards lie at a URL.
        resident_fits: whether the decoded set would fit in memory.
        fits_page_cache: whether the training shards do.
        stored_side, needed_side: shorter side in pixels, of the median stored image and of what evaluation needs.
    """

    loader: str
    device: str
    step_key: str
    crop: str
    policy: str
    precision: str
    num_threads: int
    num_cores: int
    streamed: bool
    resident_fits: bool
    fits_page_cache: bool
    stored_side: float
    needed_side: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Ratios of medians, in decoded images/s; a figure is None where a row it needs was not measured.

    Args:
        path: keys of the rows that every batch of this run passes through.
        binding: the slowest of them.
        required: what the loader must deliver so that the step never waits: the rate of the step.
        end_to_end: rate of training.
        efficiency: end to end over the binding row; None too where that is the storage and end to end was measured from warm pages.
        from_warm_pages: whether it was: what is measured reads from memory what a whole run reads from the storage.
        loader_headroom: loader alone over end to end.
        contention_loss: share of the step's rate that is lost while the loader runs beside it.
        stall_share: of training time, spent waiting for data.
        turns: on a CPU, the rate at which loader and step could take turns on the same cores; None on CUDA.
    """

    path: tuple[str, ...]
    binding: str
    required: float
    end_to_end: float | None
    efficiency: float | None
    from_warm_pages: bool
    loader_headroom: float | None
    contention_loss: float | None
    stall_share: float | None
    turns: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "required_views_per_s": self.required * VIEWS_PER_DECODED}


def path_of(facts: Facts, rows: Sequence[Row]) -> list[Row]:
    """The measured rows that bound this run: its storage, read, decode, loader, copy and step."""
    measured = {row.key: row for row in rows if row.rates}
    wanted: list[str] = []
    if facts.loader in READS_TARS:
        storage = ["storage.warm"] if facts.fits_page_cache else ["storage.cold", "storage.warm"]
        wanted += [key for key in storage if key in measured][:1]
        wanted += ["read.dali", _decode_key(facts)]
    if facts.loader in COPIES_PIXELS and facts.device == "cuda":
        wanted.append("copy.pinned")
    return [measured[key] for key in (*wanted, "loader", facts.step_key) if key in measured]


def _decode_key(facts: Facts) -> str:
    if facts.device == "cuda":
        return "decode.gpu.own"
    return "decode.all.full" if facts.crop == "pad" else "decode.all.region"


def judge(facts: Facts, rows: Sequence[Row]) -> Verdict | None:
    """The verdict; None where neither the loader nor the step could be measured."""
    path = path_of(facts, rows)
    medians = {row.key: row.median for row in rows if row.rates}
    if "loader" not in medians or facts.step_key not in medians:
        return None
    binding = min(path, key=lambda row: row.median)
    loader, step, real = medians["loader"], medians[facts.step_key], medians.get("together.real")
    discarded = medians.get("together.discarded")
    from_warm_pages = any(row.key == "storage.cold" for row in path)
    details = next((row.details for row in rows if row.key == "together.real"), {})
    return Verdict(
        path=tuple(row.key for row in path),
        binding=binding.key,
        required=step,
        end_to_end=real,
        efficiency=None if real is None or binding.key == "storage.cold" else real / binding.median,
        from_warm_pages=from_warm_pages,
        loader_headroom=None if real is None else loader / real,
        contention_loss=None if discarded is None else 1.0 - discarded / step,
        stall_share=details.get("stall_share"),
        turns=1.0 / (1.0 / loader + 1.0 / step) if facts.device == "cpu" else None,
    )
