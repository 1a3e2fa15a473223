"""Whether a loader stays as it is over many epochs, and what the order and its hand-over cost.

python benchmarks/steady.py memory --images DIR [--loader dali] [--epochs 20]     resident memory after each epoch, and its slope
python benchmarks/steady.py handover [--samples 115846] [--batch-size 256]        host time a step before any pixel is read

`memory` abandons every third epoch after two batches, as a killed or restarted run does. The first epochs fill pools and caches, so the
slope is a least-squares line over the second half.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from photographs import link_photographs, shard_photographs

from bce3s.cli import run_app
from pipelines.augment.policies import draw_policy
from pipelines.config import AugmentConfig, DataConfig, OrderConfig
from pipelines.format import ShardSet
from pipelines.format.touch import read_ahead
from pipelines.loaders import build_loader
from pipelines.loaders.damage import SampleGuard
from pipelines.loaders.plan import SplitGeometry, train_plans
from pipelines.order import SampleOrder

IMAGE_SIZE = 224
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def photo_shards(images: Path, scratch: Path, repeats: int, formats: tuple[str, ...] = ("wds",)) -> ShardSet:
    """Shards of the photographs, each linked `repeats` times."""
    link_photographs(images, scratch / "photos", repeats)
    return shard_photographs(scratch / "photos", scratch / "shards", formats)


def resident_mib() -> float:
    """Memory of this process that lies in RAM, without the mapped files that the page cache holds anyway."""
    fields = {
        line.split(":")[0]: line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if ":" in line and "kB" in line
    }
    return int(fields["RssAnon"]) / 1024


@app.command()
def memory(
    images: Annotated[Path, typer.Option(help="Folder of photographs (JPEG).")],
    loader: Annotated[str, typer.Option(help="A loader.")] = "dali",
    epochs: Annotated[int, typer.Option(help="Epochs, at least 4.")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Resident memory after each epoch and its slope."""
    with tempfile.TemporaryDirectory() as scratch:
        shards = photo_shards(images, Path(scratch), repeats=2, formats=("wds", "ffcv") if loader == "ffcv" else ("wds",))
        config = DataConfig(loader=loader, batch_size=32, image_size=IMAGE_SIZE)
        built = build_loader(shards, "train", config, seed=0, device=torch.device("cpu"))
        sizes_mib, threads = [], []
        for epoch in range(epochs):
            for batch in built.epoch(epoch):
                if epoch % 3 == 2 and batch.step == 1:
                    break
            sizes_mib.append(resident_mib())
            threads.append(len(os.listdir("/proc/self/task")))
        built.close()
    half = np.arange(epochs // 2, epochs)
    slope = float(np.polyfit(half, np.array(sizes_mib)[half], 1)[0])
    figures = {"loader": loader, "rss_anon_mib": sizes_mib, "slope_mib_per_epoch": slope, "threads": threads}
    print(f"{loader}: {sizes_mib[0]:.0f} MiB after the first epoch, {sizes_mib[-1]:.0f} after epoch {epochs}")
    print(f"{loader}: slope over the second half {slope:+.3f} MiB an epoch; threads {threads[epochs // 2]} -> {threads[-1]}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1))


def median_ms(function: Callable[[], Any], repeats: int = 50) -> float:
    """Milliseconds of a call, median."""
    times = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        function()
        times.append((time.perf_counter() - started_s) * 1e3)
    return statistics.median(times)


@app.command()
def handover(
    images: Annotated[Path, typer.Option(help="Folder of photographs (JPEG).")],
    samples: Annotated[int, typer.Option(help="N of the order; ImageNet-LT has 115,846.")] = 115_846,
    classes: Annotated[int, typer.Option(help="K.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Source images a step.")] = 256,
) -> None:
    """Host time a step of everything before the decoder."""
    counts = np.maximum(1, (samples / classes * 4 * np.exp(-np.arange(classes) / classes * 4)).astype(np.int64))
    labels_N = np.repeat(np.arange(classes), counts)
    order = SampleOrder(labels_N, classes, batch_size, 0, OrderConfig(sampling="class-balanced", drop_last=True))
    sizes_N2 = np.full((len(labels_N), 2), 400, np.int64)
    geometry = SplitGeometry(sizes_N2=sizes_N2, kept_N2=sizes_N2, image_size=IMAGE_SIZE)
    order.partner_epoch(0)  # compiled
    order.instance_epoch(0)
    rows = {
        "order (both streams, a step's share)": median_ms(lambda: (order.instance_epoch(1), order.partner_epoch(1)), 9) / order.num_steps
    }
    plans = train_plans(order, geometry, AugmentConfig(), 0, 0, 0, 1)
    rows["plan (ids, crops, flips, mixing)"] = median_ms(lambda: next(plans))
    rows["policy autoaugment, if asked for"] = median_ms(
        lambda: draw_policy("autoaugment-cifar10", np.arange(2 * batch_size, dtype=np.uint64))
    )
    with tempfile.TemporaryDirectory() as scratch:
        split = photo_shards(images, Path(scratch), repeats=4).split("train")
        guard, ids = SampleGuard(split), np.random.default_rng(0).integers(0, len(split), 2 * batch_size)
        guard.require_whole(ids)
        rows["read ahead (madvise)"] = median_ms(lambda: read_ahead(split.addresses(ids), split.sizes_N[ids]))
        rows["guard (ends of images, length of shards)"] = median_ms(lambda: guard.require_whole(ids))
        rows["views into the tars"] = median_ms(lambda: split.encoded(ids))
    for name, value in rows.items():
        print(f"{name:45s} {value:8.3f} ms a step of {2 * batch_size} images")


if __name__ == "__main__":
    run_app(app)
