"""A conversion of the size of a published data set: wall-clock, memory of all processes, opening the result, drawing a balanced order.

python benchmarks/link_farm.py inat18 FARM --photos DIR --lists DIR
python benchmarks/full_size.py --dataset inat18 --source FARM --lists FARM --out SHARDS

The pixels are a few photographs under many names, so compression, page cache and disk see real sizes; accuracy is not what this is for.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bce3s.cli import run_app
from pipelines.config import OrderConfig
from pipelines.format import open_shards
from pipelines.order import SampleOrder

TOOL = Path(__file__).resolve().parents[1] / "tools" / "make_shards.py"
_POLL_S = 0.25
_TURNS = 7
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def process_tree(root: int) -> list[int]:
    """Ids of a process and all its descendants."""
    children = [int(pid) for file in Path(f"/proc/{root}/task").glob("*/children") for pid in file.read_text().split()]
    return [root, *(descendant for child in children for descendant in process_tree(child))]


def proportional_bytes(root: int) -> int:
    """Memory of a process tree, pages that several share counted once (PSS)."""
    total = 0
    for pid in process_tree(root):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) << 10
    return total


def converted(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak memory of the command line."""
    started_s, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, str(TOOL), *arguments]) as process:
        while process.poll() is None:
            try:
                peak = max(peak, proportional_bytes(process.pid))
            except (OSError, ValueError):
                pass  # a process ended while it was looked at
            time.sleep(_POLL_S)
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - started_s, peak


@app.command("open")
def open_once(out: Path) -> None:
    """Opens the training split and prints the seconds; run in a fresh process by `convert`."""
    started_s = time.perf_counter()
    split = open_shards(out).split("train")
    opened_s = time.perf_counter() - started_s
    num_classes = len(open_shards(out).class_names)
    order = SampleOrder(split.labels_N, num_classes, 256, 0, OrderConfig(sampling="class-balanced"))
    order.partner_epoch(0)  # compiles, or loads what was compiled
    times_s = []
    for epoch in range(1, 1 + _TURNS):
        started_s = time.perf_counter()
        drawn_N = order.partner_epoch(epoch)
        times_s.append(time.perf_counter() - started_s)
    counts_K = np.bincount(split.labels_N[drawn_N], minlength=num_classes)
    print(
        json.dumps({"open_s": opened_s, "order_s": statistics.median(times_s), "num_samples": len(split), "max_draws": int(counts_K.max())})
    )


@app.command("convert")
def convert(
    dataset: Annotated[str, typer.Option(help="imagenet-lt or inat18.")],
    source: Annotated[Path, typer.Option(help="The link farm.")],
    lists: Annotated[Path, typer.Option(help="Folder of its lists.")],
    out: Annotated[Path, typer.Option(help="Where the shards go; tens of GB.")],
) -> None:
    """Converts with --keep --no-validate, then opens the result in fresh processes."""
    arguments = ["--dataset", dataset, "--source", str(source), "--lists", str(lists), "--out", str(out), "--keep", "--no-validate"]
    wall_s, peak = converted(arguments)
    shards = open_shards(out)
    num_images = sum(shards.num_samples(split) for split in ("train", "val", "test"))
    num_bytes = sum(shard["shard_bytes"] for entry in shards.manifest["splits"].values() for shard in entry["shards"])
    rates = f"{num_images / wall_s:,.0f} images/s, {num_bytes / 1e6 / wall_s:.0f} MB/s"
    print(f"{num_images:,} images, {num_bytes / 1e9:.1f} GB, {wall_s:.0f} s: {rates}")
    print(f"peak memory of all processes (PSS): {peak / (1 << 30):.2f} GiB")
    command = [sys.executable, __file__, "open", str(out)]
    figures = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(_TURNS)]
    for name, what in (("open_s", "opening the index and every tar of train"), ("order_s", "a class-balanced order")):
        values = [figure[name] for figure in figures]
        spread = f"median {statistics.median(values):.4f} s [{min(values):.4f}–{max(values):.4f}], n = {_TURNS}"
        print(f"{what}, {figures[0]['num_samples']:,} samples: {spread}")


if __name__ == "__main__":
    run_app(app)
