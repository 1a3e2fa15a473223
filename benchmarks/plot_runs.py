"""Draws per-class test accuracy against the class's number of training images, one line a run (last epoch, no test-time augmentation).

python benchmarks/plot_runs.py runs/a runs/b --out docs/figures/cifar10lt_per_class.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer

from bce3s.checkpoint import load_checkpoint
from bce3s.cli import run_app
from bce3s.runlog import METRICS_FILE, read_metrics
from bce3s.train import newest_checkpoint
from pipelines.types import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
COLOURS = ("#0b5fa5", "#d1603d", "#4b8b3b", "#7a5195")


def load_figures(run: Path) -> dict[str, Any]:
    """The summary of a finished run with its class names, training counts and loss name."""
    summaries = [line for line in read_metrics(run) if line["kind"] == "summary"]
    if not summaries:
        raise UserError(f"{run / METRICS_FILE} holds no finished run; train to the end first")
    state = load_checkpoint(newest_checkpoint(run), torch.device("cpu"))
    return {**summaries[-1]["last_epoch_no_tta"], "counts": state["train_counts"], "names": state["class_names"], "run": run.name}


@app.command()
def main(
    runs: Annotated[list[Path], typer.Argument(help="Finished run folders on one data set.")],
    out: Annotated[Path, typer.Option(help="PNG or SVG file to write.")],
    labels: Annotated[str, typer.Option(help="Names of the runs, separated by commas.")] = "",
) -> None:
    """Draw the figure."""
    figures = [load_figures(run) for run in runs]
    names = labels.split(",") if labels else [figure["run"] for figure in figures]
    order = np.argsort(figures[0]["counts"], kind="stable")[::-1]
    fig, axes = plt.subplots(figsize=(8, 3.4), constrained_layout=True)
    positions = np.arange(len(order))
    counts = np.array(figures[0]["counts"])[order]
    width = 0.8 / len(figures)
    for number, (figure, name) in enumerate(zip(figures, names, strict=True)):
        accuracy = np.array(figure["per_class"], float)[order]
        offset = (number - (len(figures) - 1) / 2) * width
        axes.bar(positions + offset, accuracy, width, color=COLOURS[number % len(COLOURS)], label=f"{name}: {figure['all']:.2f} % overall")
    axes.set_xticks(positions, [f"{figures[0]['names'][k]}\n{counts[i]:,}" for i, k in enumerate(order)], fontsize=8)
    axes.set_xlabel("class, and its number of training images")
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=160)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_app(app)
