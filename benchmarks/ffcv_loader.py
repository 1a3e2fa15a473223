"""Speed of the `ffcv` loader as a ratio to a bare `ffcv.Loader` over the same beton with the same operations and none of our code.

python benchmarks/ffcv_loader.py --images DIR [--json FILE]

Both sides decode photographs, take a random crop to 224 px and flip half of them, in batches of the same size with the same threads and
as many batches ahead. The bare side draws its own order and crops, as FFCV's documentation shows it. The sides take turns, `--rounds`
times, so that a machine whose speed drifts slows both; the ratio is taken round by round. Ours includes order, plan, labels and checks.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from photographs import link_photographs, shard_photographs
from turns import report

from bce3s.cli import run_app
from pipelines.config import AugmentConfig, DataConfig
from pipelines.format import ShardSet
from pipelines.format.ffcv_package import import_ffcv
from pipelines.loaders import build_loader

IMAGE_SIZE = 224
AREA_RANGE = (0.08, 1.0)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def bare_loader(beton: Path, batch_size: int, num_workers: int, batches_ahead: int) -> Any:
    """FFCV alone, as its documentation shows it for ImageNet."""
    loaders, decoders, transforms = (import_ffcv(f"ffcv.{name}", "this benchmark") for name in ("loader", "fields.decoders", "transforms"))
    crop = decoders.RandomResizedCropRGBImageDecoder((IMAGE_SIZE, IMAGE_SIZE), scale=AREA_RANGE)
    return loaders.Loader(
        str(beton),
        batch_size=batch_size,
        num_workers=num_workers,
        os_cache=True,
        order=loaders.OrderOption.RANDOM,
        drop_last=True,
        batches_ahead=batches_ahead,
        pipelines={
            "image": [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()],
            "label": [decoders.IntDecoder(), transforms.ToTensor()],
        },
    )


def bare_batches(loader: Any) -> Iterator[int]:
    """Decoded images of each batch, epoch after epoch."""
    while True:
        for images, _ in loader:
            yield len(images)


def our_batches(shards: ShardSet, config: DataConfig) -> Iterator[int]:
    """Decoded images of each batch of the loader `ffcv`, epoch after epoch."""
    loader, epoch = build_loader(shards, "train", config, seed=0, device=torch.device("cpu")), 0
    while True:
        for batch in loader.epoch(epoch):
            yield len(batch.ids_S)
        epoch += 1


def images_per_s(batches: Iterator[int], num_images: int) -> float:
    """Over at least `num_images`, from a pause on in which the side that was measured before has stopped reading ahead."""
    time.sleep(1)
    started_s, decoded = time.perf_counter(), 0
    while decoded < num_images:
        decoded += next(batches)
    return decoded / (time.perf_counter() - started_s)


@app.command()
def main(
    images: Annotated[Path, typer.Option(help="Folder of photographs (JPEG).")],
    rounds: Annotated[int, typer.Option(help="Measurements of each side.")] = 9,
    batches: Annotated[int, typer.Option(help="Decoded batches a measurement.")] = 40,
    batch_size: Annotated[int, typer.Option(help="Images decoded in one FFCV batch (two streams of half as many).")] = 64,
    repeats: Annotated[int, typer.Option(help="How often each photograph is in the set.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure and print the ratio."""
    num_threads, prefetch = os.cpu_count() or 1, 3  # FFCV's own default
    with tempfile.TemporaryDirectory() as scratch:
        link_photographs(images, Path(scratch) / "photos", repeats)
        shards = shard_photographs(Path(scratch) / "photos", Path(scratch) / "shards", ("wds", "ffcv"))
        config = DataConfig(
            loader="ffcv",
            batch_size=batch_size // 2,
            image_size=IMAGE_SIZE,
            num_threads=num_threads,
            prefetch_batches=prefetch,
            augment=AugmentConfig(area_range=AREA_RANGE),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FFCV's code generator uses what Python has since deprecated
            bare = bare_batches(bare_loader(Path(scratch) / "shards" / "train.beton", batch_size, num_threads, prefetch))
            started_s = time.perf_counter()
            next(bare)
        bare_start_s, started_s = time.perf_counter() - started_s, time.perf_counter()
        ours = our_batches(shards, config)
        next(ours)
        print(f"first batch: bare {bare_start_s:.1f} s, ffcv loader {time.perf_counter() - started_s:.1f} s")
        sides = (bare, ours)
        for side in sides:
            images_per_s(side, batches * batch_size)
        pairs = []
        for turn in range(rounds):
            first, second = (0, 1) if turn % 2 == 0 else (1, 0)
            found = {first: images_per_s(sides[first], batches * batch_size), second: images_per_s(sides[second], batches * batch_size)}
            pairs.append((found[0], found[1]))
            print(f"round {turn + 1}: bare {found[0]:.0f} images/s, ffcv loader {found[1]:.0f} images/s, ratio {found[1] / found[0]:.3f}")
    report(pairs, batch_size, num_threads, ("ffcv", "torch"), json_file)
    os._exit(0)  # what FFCV compiled complains when the interpreter ends, and its thread is still waiting to hand over a batch


if __name__ == "__main__":
    run_app(app)
