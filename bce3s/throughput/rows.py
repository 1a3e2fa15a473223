"""Rows of the profile: the samples of one measured stage, in two units.

**Units.** A step with B source images decodes two streams, 2B images (instance and partner), and trains on three views of B: 3B forward
views. A decoded image is therefore worth 3/2 forward views, and a step that consumes X views/s needs 2/3·X decoded images/s from the
loader. Every rate is kept in decoded images/s; views/s are derived from it here and nowhere else.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

VIEWS_PER_DECODED = 3 / 2
PROFILE_FORMAT = "bce3s-profile"
PROFILE_VERSION = 1
NEEDS_CUDA = "needs a CUDA device"
BEHIND = 0.99  # batches a step, below which the loader does not keep pace
HARDWARE_LOADS = (0.0, 0.5, 0.65, 0.8, 0.9, 1.0)

# Every row of a profile in the order in which it is shown; the heading of a group is the part of the key before the dot.
SECTIONS = {
    "storage": "storage, in the real order",
    "read": "host read, no decode",
    "decode": "decode only",
    "loader": "loader alone",
    "copy": "host to device",
    "step": "step on a fixed batch",
    "part": "parts of the step",
    "together": "loader and step together",
}
NAMES = {
    "storage.cold": "cold page cache",
    "storage.warm": "warm page cache",
    "read.touch": "one byte of every page",
    "read.dali": "handed to DALI",
    "decode.one.full": "1 thread, whole",
    "decode.one.region": "1 thread, crop's region",
    "decode.all.full": "all threads, whole",
    "decode.all.region": "all threads, region",
    **{f"decode.gpu.{load:g}": f"GPU, hardware share {load:g}" for load in HARDWARE_LOADS},
    "decode.gpu.own": "GPU, the run's own share",
    "loader": "batches left on device",
    "copy.pinned": "uint8, pinned",
    "copy.pageable": "uint8, pageable",
    "copy.float": "fp32, pinned",
    "step.contiguous": "eager, contiguous",
    "step.channels_last": "eager, channels-last",
    "step.compiled": "compiled",
    "step.graph": "CUDA graph",
    "part.views": "views",
    "part.forward": "forward and loss",
    "part.backward": "backward",
    "part.update": "optimizer",
    "together.discarded": "step, loader's discarded",
    "together.real": "end to end",
    "together.cached": "cached replay",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage.

    Args:
        key: of `NAMES`.
        rates: decoded images/s of each repeat, all above 0; empty if it was not measured.
        reason: why it was not measured; empty if it was.
        details: figures beside the rate, such as GB/s or the share of peak; JSON values.
    """

    key: str
    rates: tuple[float, ...] = ()
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.key in NAMES, f"{self.key} is not in NAMES"
        assert bool(self.rates) != bool(self.reason), f"{self.key} has either samples or a reason for having none"

    @property
    def median(self) -> float:
        """Decoded images/s; only of a measured row."""
        return statistics.median(self.rates)

    @property
    def name(self) -> str:
        """Heading and name in one, for sentences."""
        section, _, rest = self.key.partition(".")
        if section == "together":
            return NAMES[self.key]
        return f"{section} ({NAMES[self.key]})" if rest else section

    @property
    def note(self) -> str:
        """The details a reader of the table wants, in a few characters."""
        found = self.details
        parts = [f"{found['gb_per_s']:.2g} GB/s"] if "gb_per_s" in found else []
        parts += [f"MFU {found['mfu']:.0%}"] if "mfu" in found else []
        parts += [f"stall {found['stall_share']:.0%}"] if "stall_share" in found else []
        parts += [f"pace {found['batches_per_step']:.0%}"] if found.get("batches_per_step", 1.0) < BEHIND else []
        parts += [f"{found['load']:g}, {found['chosen_by']}"] if "chosen_by" in found else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all samples, median and range in both units, or "not measured: …"."""
        head = {"key": self.key, "name": self.name}
        if not self.rates:
            return {**head, "measured": False, "text": f"not measured: {self.reason}", "details": dict(self.details)}
        figures = {"median": self.median, "min": min(self.rates), "max": max(self.rates), "samples": list(self.rates)}
        views = {name: figures[name] * VIEWS_PER_DECODED for name in ("median", "min", "max")}  # type: ignore[operator]
        return {**head, "measured": True, "decoded_images_per_s": figures, "forward_views_per_s": views, "details": dict(self.details)}


def row_from_dict(values: Mapping[str, Any]) -> Row:
    """Reads what `Row.to_dict` gives.

    Raises:
        KeyError, TypeError, ValueError, AssertionError: something else was given.
    """
    if not values["measured"]:
        return Row(key=values["key"], reason=str(values["text"]).removeprefix("not measured: "), details=values["details"])
    rates = tuple(float(rate) for rate in values["decoded_images_per_s"]["samples"])
    if not all(rate > 0 for rate in rates):
        raise ValueError(f"row {values['key']} holds a rate that is not above 0")
    return Row(key=values["key"], rates=rates, details=values["details"])


def complete(rows: Sequence[Row], reason: str) -> list[Row]:
    """`rows` in the order of the table; those of `NAMES` that are missing are not measured for `reason`."""
    found = {row.key: row for row in rows}
    assert len(found) == len(rows), "a row was measured twice"
    return [found.get(key, Row(key=key, reason=reason)) for key in NAMES]
