"""How often a run is saved."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipelines.config import require
from pipelines.types import ConfigError

_INTERVAL = re.compile(r"(\d+)\s*(steps?|epochs?|s|m|h)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Interval:
    """How often: every `count` of `unit`, "epoch", "step" or "s" (seconds of wall-clock)."""

    count: float
    unit: str


def parse_interval(text: str) -> Interval:
    """`500steps`, `2epochs`, `90s`, `10m` or `1h`.

    Raises:
        ConfigError: anything else, or none of them.
    """
    matched = _INTERVAL.fullmatch(text.strip())
    if matched is None or int(matched[1]) < 1:
        raise ConfigError(f"an interval is such as 500steps, 1epoch, 10m or 1h, not '{text}'")
    count, unit = int(matched[1]), matched[2]
    return Interval(count * _SECONDS[unit], "s") if unit in _SECONDS else Interval(count, unit.rstrip("s"))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What survives a kill.

    Args:
        every: how often a run is saved: 500steps, 1epoch, 10m or 1h.
        keep: checkpoints that stay; older ones are deleted once a newer one is safe on disk.
    """

    every: str = "1epoch"
    keep: int = 2

    def __post_init__(self) -> None:
        parse_interval(self.every)
        require(self.keep >= 1, f"keep must be at least 1, not {self.keep}")
