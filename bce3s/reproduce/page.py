"""TABLE.md from what TABLE.json holds, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bce3s.metrics import format_percent
from bce3s.reproduce.claims import claim_sentence
from bce3s.reproduce.figures import measure_title
from bce3s.seeds import GROUPS

MISSING = "–"


def page(record: dict[str, Any]) -> str:
    """The table as markdown: headline with the published figures, what stands beside it, claims, cost, environment, commands."""
    trained = [row for row in record["rows"] if row["trained"]]
    parts = [f"# {record['title']}", f"`{record['command']}`", *record["notes"], _headline(record["rows"]), _labels(record["rows"])]
    beside = _beside(trained)
    parts += ["## Beside the headline", beside] if beside else []
    parts += ["## Claims", _claims(record["claims"])] if record["claims"] else []
    parts += ["## Cost", _costs(trained), "## Environment", _environments(record), "## Commands of single runs", _commands(trained)]
    return "\n\n".join(part for part in parts if part) + "\n"


def spread_cell(spread: dict[str, float | None] | None) -> str:
    """'54.73 ± 0.21', without the deviation where there is one run, 'n/a' where the group is empty."""
    if spread is None:
        return "n/a"
    return f"{spread['mean']:.2f}" if spread["sd"] is None else f"{spread['mean']:.2f} ± {spread['sd']:.2f}"


def headline_cells(row: dict[str, Any]) -> list[str]:
    """Ours, by shot group: figures, or a dash where no run is finished."""
    groups = row.get("figures", {}).get(row["headline"])
    return [MISSING if groups is None else spread_cell(groups[group]) for group in GROUPS]


def counted(row: dict[str, Any]) -> str:
    """How many runs a row has, and of how many that were asked for: '3', '1 of 3'."""
    if not row["trained"]:
        return MISSING
    missing = len(row["missing_seeds"])
    return str(row["n"]) if not missing else f"{row['n']} of {row['n'] + missing}"


def _grid(head: Iterable[str], lines: Iterable[Iterable[str]], left: int = 1) -> str:
    names = list(head)
    rule = ["---" if number < left else "---:" for number in range(len(names))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rule, *map(list, lines)))


def _headline(rows: list[dict[str, Any]]) -> str:
    sources = _sources(rows)
    head = ["top-1, %", *GROUPS, "n", *(f"published {group}" for group in GROUPS), "whose"]
    lines = []
    for row in rows:
        published = row["published"]
        cells = [MISSING] * len(GROUPS) if published is None else [_published_cell(published[group]) for group in GROUPS]
        whose = MISSING if published is None else f"[{sources.index(published['label']) + 1}]"
        measure = "" if not row["trained"] or row["headline"] == "last_epoch_no_tta" else f" ({measure_title(row['headline'])})"
        lines.append([row["title"] + measure, *headline_cells(row), counted(row), *cells, whose])
    return _grid(head, lines)


def _published_cell(value: float | None) -> str:
    return MISSING if value is None else format_percent(value)


def _sources(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["published"]["label"] for row in rows if row["published"] is not None))


def _labels(rows: list[dict[str, Any]]) -> str:
    ours = (
        "Ours: test split, last epoch, no test-time augmentation unless the row says otherwise; mean ± sample standard deviation over n "
        f"seeds. {MISSING}: no finished run, or not published. n/a: no class in this group (many > 100, medium 20–100, few < 20 training "
        "images)."
    )
    listed = "\n".join(f"{number}. {label}" for number, label in enumerate(_sources(rows), 1))
    return ours + (f"\n\nPublished:\n\n{listed}" if listed else "")


def _beside(rows: list[dict[str, Any]]) -> str:
    shown: set[tuple[str, str]] = set()
    lines = []
    for row in rows:
        for measure, groups in row["figures"].items():
            # Rows that share their runs share these lines too.
            if measure == row["headline"] or (row["runs"], measure) in shown:
                continue
            shown.add((row["runs"], measure))
            lines.append([row["title"], measure_title(measure), *(spread_cell(groups[group]) for group in GROUPS), str(row["n"])])
    return _grid(["top-1, %", "measured", *GROUPS, "n"], lines, left=2) if lines else ""


def _claims(claims: list[dict[str, Any]]) -> str:
    rule = (
        "A claim holds where the whole 95 % interval of the difference lies above 0, and speaks against it where the whole interval lies "
        f"below; else it is not decided. Each interval stands for itself: of {len(claims)}, some may miss the truth by chance."
    )
    return rule + "\n\n" + "\n".join(f"- {claim_sentence(claim)}" for claim in claims)


def _costs(rows: list[dict[str, Any]]) -> str:
    lines = [[row["title"], *_cost_cells(row["cost"]), counted(row)] for row in rows if row["runs"] == row["name"]]
    text = "Means over the runs: training of stage one alone, and from start to end with all evaluations and stages."
    return text + "\n\n" + _grid(["a run", "training, min", "start to end, min", "source images/s", "n"], lines)


def _cost_cells(cost: dict[str, float | None]) -> list[str]:
    minutes = [MISSING if cost[name] is None else f"{cost[name] / 60:.1f}" for name in ("train_s", "wall_s")]  # type: ignore[operator]
    return [*minutes, MISSING if cost["images_per_s"] is None else f"{cost['images_per_s']:,.0f}"]


def _environments(record: dict[str, Any]) -> str:
    lines = [f"- bce3s {record['version']}, budget {record['budget']}, device asked for: {record['device_asked']}"]
    for found in record["environments"]:
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        commits = ", ".join(found["commits"]) or "not known"
        lines.append(
            f"- {found['device']}, {found['cores']} cores, {found['threads']} torch threads, {found['precision']}; Python "
            f"{found['python']}, {versions}; commit {commits}"
        )
    return "\n".join(lines if record["environments"] else [*lines, "- no finished run yet"])


def _commands(rows: list[dict[str, Any]]) -> str:
    return "```bash\n" + "\n".join(row["command"] for row in rows if row["runs"] == row["name"]) + "\n```"
