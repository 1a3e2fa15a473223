"""Which runs a report is of: the folders that were named, those of a seeds folder one by one, and a short name for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bce3s.runlog import CONFIG_FILE, read_json
from bce3s.seeds import SEEDS_FILE
from pipelines.types import UserError

_SEED_FOLDER = re.compile(r"s(\d+)")


def run_folders(places: Sequence[Path]) -> tuple[list[Path], dict[Path, list[Path]]]:
    """The runs at `places`, each once, in their order.

    Returns:
        Run folders; and seeds folder → those of its runs.

    Raises:
        UserError: a place is neither a run folder nor a folder of seeds; says what to name instead.
    """
    found: dict[Path, Path] = {}  # resolved → as it was named
    of_seeds: dict[Path, list[Path]] = {}
    for place in places:
        runs = [place] if (place / CONFIG_FILE).is_file() else _seeds_of(place)
        if not runs:
            raise UserError(_why_not(place))
        named = [found.setdefault(run.resolve(), run) for run in runs]
        if runs != [place]:
            of_seeds[place] = named
    return list(found.values()), of_seeds


def _seeds_of(place: Path) -> list[Path]:
    """Run folders s0, s1, … by seed; a seeds folder whose runs have not all ended has no seeds.json yet."""
    seeds = {int(match[1]): path for path in _inside(place) if (match := _SEED_FOLDER.fullmatch(path.name))}
    return [path for _, path in sorted(seeds.items()) if (path / CONFIG_FILE).is_file()]


def _why_not(place: Path) -> str:
    if (place / SEEDS_FILE).is_file():
        return f"{place} holds {SEEDS_FILE} but no run any more; name a folder that 'bce3s fast-train --out' wrote"
    runs = [path.name for path in _inside(place) if (path / CONFIG_FILE).is_file()]
    if runs:
        more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
        return f"{place} is no run folder but holds runs ({', '.join(runs[:3])}{more}); name those, as in 'bce3s report {place / runs[0]}'"
    if place.is_dir():
        read_json(place / CONFIG_FILE)  # says what a run folder is
    kind = "is a file, not a run folder" if place.exists() else "does not exist"
    return f"{place} {kind}; name a folder that 'bce3s fast-train --out' wrote"


def _inside(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []


def short_names(folders: Sequence[Path]) -> list[str]:
    """The ends of their paths that tell them apart; a stage two has its run's name before its own."""
    parts = [folder.resolve().parts for folder in folders]
    lengths = [2 if each[-1].startswith("stage2-") else 1 for each in parts]
    while True:
        names = ["/".join(each[-length:]) for each, length in zip(parts, lengths, strict=True)]
        alike = [i for i, name in enumerate(names) if names.count(name) > 1 and lengths[i] < len(parts[i])]
        if not alike:
            return names
        for i in alike:
            lengths[i] += 1
