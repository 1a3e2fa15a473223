"""What a finished stage two says."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from bce3s.progress import accuracy_table
from bce3s.retrain.stage_two import StageTwo
from bce3s.train import RunResult


def print_stage_two(console: Console, stage_two: StageTwo, result: RunResult, out: Path) -> None:
    """The table, labelled, where the result lies, and how to measure it again."""
    method, started = stage_two.config.retrain.method, stage_two.stage_one.path
    rows = {f"stage two, {name}": accuracy for name, accuracy in result.rows().items()}
    if method == "tau-norm":
        rows = {name.replace("last epoch", f"τ = {stage_two.config.retrain.tau:g}"): accuracy for name, accuracy in rows.items()}
    caption = f"from {started}; {result.last.num_images:,} images"
    console.print(accuracy_table(f"stage two ({method}), {result.report_split} split", rows, caption))
    console.print(f"run: {out}   evaluate again: bce3s evaluate {out}", highlight=False, soft_wrap=True)
