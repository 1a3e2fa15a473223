"""The whole examination: probes beside each other, then the disk, then the verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bce3s.doctor.disk import disk_row
from bce3s.doctor.machine import machine_rows
from bce3s.doctor.processes import Facts, probe
from bce3s.doctor.rows import Row
from bce3s.doctor.software import EXTRAS, NEEDED, driver_version, extra_rows, gpu_rows, installed, package_rows
from bce3s.doctor.verdict import Verdict, judge

_PROBES_S = 120.0  # on a network disk and a busy machine, torch alone takes most of a minute
_EXAMPLE = "folder"


class Examination(NamedTuple):
    """What was found, and what follows."""

    rows: list[Row]
    verdict: Verdict


def examine(shards: str | None, folder: Path) -> Examination:
    """Looks at everything; takes about ten seconds on two cores.

    Args:
        shards: folder or URL that the loader is to be chosen for; None chooses by what is installed.
        folder: whose disk is measured.

    Raises:
        OSError: `folder` is not there.
    """
    # What imports torch shares a process, for that takes longest; FFCV last, because it may fail in the most ways.
    others = [f"choice {shards}" if shards else f"recipe {_EXAMPLE}", *installed(("ffcv",))]
    with_torch = ["torch", "cuda", "jpeg", "triton", "webdataset", "memory", *others]
    without = ["dali", "dali_gpu", *(module for module in NEEDED if module != "webdataset")]
    extras = installed(tuple(module for modules in EXTRAS.values() for module in modules))
    facts = probe([with_torch, without, extras], _PROBES_S)
    # The disk only now: a core that imports is a core that does not read.
    machine = [*machine_rows(len(facts["torch"].get("gpus", [])), facts["memory"].get("free_bytes")), disk_row(folder)]
    rows = [*package_rows(facts), *gpu_rows(facts, driver_version()), *extra_rows(facts), *machine]
    rows = [_blaming_the_cause(row, facts) for row in rows]
    return Examination(rows, judge(rows, facts, shards))


def _blaming_the_cause(row: Row, facts: Facts) -> Row:
    """What fails with the very words of torch or numpy fails because of it."""
    for cause in ("numpy", "torch"):
        error = facts[cause].get("error")
        if error is not None and row.name != cause and error in row.value:
            return replace(row, remedy=f"mend {cause} first")
    return row
