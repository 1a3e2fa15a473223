"""Speed of the `resident` loader as a ratio to `dali` on the same photographs: both deliver 224-px random crops of the same plans.

python benchmarks/resident.py --images DIR [--json FILE]

Photographs are linked under many names, so that the decoded set is far larger than any cache of the processor. The sides take turns,
`--rounds` times, so that a machine whose speed drifts slows both; the ratio is taken round by round. Both include order, plan and labels.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import nvidia.dali
import torch
import typer
from photographs import link_photographs, shard_photographs
from turns import current_commit

from bce3s.cli import run_app
from pipelines.config import AugmentConfig, DataConfig, ResidentConfig
from pipelines.format import ShardSet
from pipelines.loaders import build_loader
from pipelines.loaders.resident_size import resident_bytes

IMAGE_SIZE, MIN_SIDE = 224, 256
STREAM_BATCHES = (64, 256)
JITTER = (0.4, 0.4, 0.4)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Side:
    """A loader of which whole epochs are timed: nothing decoded ahead is left over for the next measurement, or decoded during another."""

    def __init__(self, shards: ShardSet, config: DataConfig) -> None:
        started_s = time.perf_counter()
        self._loader = build_loader(shards, "train", config, seed=0, device=torch.device("cpu"))
        self.start_s = time.perf_counter() - started_s
        self._epoch = 0

    def time(self, num_epochs: int) -> float:
        """images/s over so many epochs."""
        started_s, delivered = time.perf_counter(), 0
        for _ in range(num_epochs):
            delivered += sum(len(batch.ids_S) for batch in self._loader.epoch(self._epoch))
            self._epoch += 1
        return delivered / (time.perf_counter() - started_s)

    def close(self) -> None:
        """Frees threads and images."""
        self._loader.close()


def measure(shards: ShardSet, config: DataConfig, rounds: int, resident_epochs: int) -> dict[str, Any]:
    """Rounds of both sides with one batch size; figures of one row."""
    dali, resident = Side(shards, replace(config, loader="dali")), Side(shards, config)
    # Contrast and saturation need the pixels a second time, so the jitter is a row of its own.
    jittered = Side(shards, replace(config, augment=replace(config.augment, color_jitter=JITTER)))
    sides = ((dali, 1), (resident, resident_epochs), (jittered, resident_epochs))
    for side, num_epochs in sides:
        side.time(num_epochs)
    found = []
    for turn in range(rounds):
        order = range(3) if turn % 2 == 0 else reversed(range(3))
        speeds = {place: sides[place][0].time(sides[place][1]) for place in order}
        found.append([speeds[place] for place in range(3)])
        print(
            f"batch 2×{config.batch_size}, round {turn + 1}: dali {found[-1][0]:.0f}, resident {found[-1][1]:.0f}, "
            f"with jitter {found[-1][2]:.0f} images/s, ratio {found[-1][1] / found[-1][0]:.1f}"
        )
    for side, _ in sides:
        side.close()
    ratios = [speeds[1] / speeds[0] for speeds in found]
    return {
        "batch": 2 * config.batch_size,
        "n": rounds,
        "dali_images_per_s_median": statistics.median(speeds[0] for speeds in found),
        "resident_images_per_s_median": statistics.median(speeds[1] for speeds in found),
        "jittered_images_per_s_median": statistics.median(speeds[2] for speeds in found),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "fill_s": resident.start_s,
    }


@app.command()
def main(
    images: Annotated[Path, typer.Option(help="Folder of photographs (JPEG).")],
    rounds: Annotated[int, typer.Option(help="Measurements of each side.")] = 9,
    repeats: Annotated[int, typer.Option(help="Names each photograph is linked under.")] = 8,
    resident_epochs: Annotated[int, typer.Option(help="Epochs of `resident` in a measurement; `dali` has one.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure and print the ratios."""
    num_threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        link_photographs(images, Path(scratch) / "photos", repeats)
        shards = shard_photographs(Path(scratch) / "photos", Path(scratch) / "shards")
        config = DataConfig(
            loader="resident",
            image_size=IMAGE_SIZE,
            num_threads=num_threads,
            resident=ResidentConfig(min_side=MIN_SIDE, cache="off"),
            augment=AugmentConfig(),
        )
        kept_bytes = resident_bytes(shards.split("train"), config)
        print(f"{shards.num_samples('train')} images, {kept_bytes / (1 << 30):.2f} GiB at shorter side {MIN_SIDE}, {num_threads} threads")
        rows = [measure(shards, replace(config, batch_size=size), rounds, resident_epochs) for size in STREAM_BATCHES]
    for row in rows:
        spread = f"range {row['ratio_min']:.1f} to {row['ratio_max']:.1f}, n = {rounds}"
        print(f"batch {row['batch']}: ratio median {row['ratio_median']:.1f}, {spread}")
    commit = current_commit()
    figures = {
        "rows": rows,
        "min_side": MIN_SIDE,
        "image_size": IMAGE_SIZE,
        "kept_bytes": kept_bytes,
        "threads": num_threads,
        "dali": nvidia.dali.__version__,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "commit": commit,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run_app(app)
