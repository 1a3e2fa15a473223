"""Speed of the `dali` loader as a ratio to a bare DALI pipeline with the same operations on the same files and none of our code.

python benchmarks/loader.py --images DIR [--json FILE]

Both sides decode the region of a random crop, resize it to 224 px and flip it, in batches of the same size with the same threads and
prefetch depth. The bare side is DALI's own file reader and its own random numbers. The sides take turns, `--rounds` times, so that a
machine whose speed drifts slows both; the ratio is taken round by round. Ours includes order, plan, labels and hand-over to torch.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from nvidia.dali import Pipeline, fn, types
from photographs import link_photographs, shard_photographs
from turns import report

from bce3s.cli import run_app
from pipelines.config import AugmentConfig, DataConfig
from pipelines.format import ShardSet
from pipelines.loaders import build_loader

IMAGE_SIZE = 224
AREA_RANGE = (0.08, 1.0)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def bare_pipeline(files: list[str], batch_size: int, num_threads: int, prefetch: int) -> Any:
    """DALI alone: its file reader, region decoder, resize and flip."""
    pipeline = Pipeline(batch_size=batch_size, num_threads=num_threads, device_id=None, prefetch_queue_depth=prefetch, seed=0)
    with pipeline:
        encoded, labels = fn.readers.file(files=files, random_shuffle=True, initial_fill=len(files), name="reader")
        images = fn.decoders.image_random_crop(encoded, output_type=types.RGB, random_area=list(AREA_RANGE))
        images = fn.resize(images, size=[IMAGE_SIZE, IMAGE_SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.flip(images, horizontal=fn.random.coin_flip()), labels)
    pipeline.build()
    return pipeline


def time_bare(pipeline: Any, num_batches: int, batch_size: int) -> float:
    """images/s over `num_batches`."""
    started_s = time.perf_counter()
    for _ in range(num_batches):
        pipeline.run()
    return num_batches * batch_size / (time.perf_counter() - started_s)


class OursRunning:
    """Our loader as an endless stream of training batches; an epoch's end costs what it costs."""

    def __init__(self, shards: ShardSet, config: DataConfig) -> None:
        self._loader = build_loader(shards, "train", config, seed=0, device=torch.device("cpu"))
        self._epoch = 0
        self._batches = iter(self._loader.epoch(0))

    def time(self, num_images: int) -> float:
        """images/s over at least `num_images` decoded images."""
        started_s, decoded = time.perf_counter(), 0
        while decoded < num_images:
            batch = next(self._batches, None)
            if batch is None:
                self._epoch += 1
                self._batches = iter(self._loader.epoch(self._epoch))
            else:
                decoded += len(batch.ids_S)
        return decoded / (time.perf_counter() - started_s)

    def close(self) -> None:
        """Frees DALI's threads."""
        self._loader.close()


@app.command()
def main(
    images: Annotated[Path, typer.Option(help="Folder of photographs (JPEG).")],
    rounds: Annotated[int, typer.Option(help="Measurements of each side.")] = 9,
    batches: Annotated[int, typer.Option(help="Decoded batches a measurement.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Images decoded in one DALI batch (two streams of half as many).")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure and print the ratio."""
    num_threads, prefetch = os.cpu_count() or 1, 2
    with tempfile.TemporaryDirectory() as scratch:
        files = link_photographs(images, Path(scratch) / "photos", repeats=24)
        shards = shard_photographs(Path(scratch) / "photos", Path(scratch) / "shards")
        augment = AugmentConfig(area_range=AREA_RANGE)
        config = DataConfig(
            loader="dali",
            batch_size=batch_size // 2,
            image_size=IMAGE_SIZE,
            num_threads=num_threads,
            prefetch_batches=prefetch,
            augment=augment,
        )
        ours = OursRunning(shards, config)
        bare = bare_pipeline(files, batch_size, num_threads, prefetch)
        time_bare(bare, batches, batch_size)
        ours.time(batches * batch_size)
        pairs = []
        for turn in range(rounds):
            measure = [lambda: time_bare(bare, batches, batch_size), lambda: ours.time(batches * batch_size)]
            first, second = (0, 1) if turn % 2 == 0 else (1, 0)
            found = {first: measure[first](), second: measure[second]()}
            pairs.append((found[0], found[1]))
            print(f"round {turn + 1}: bare {found[0]:.0f} images/s, dali loader {found[1]:.0f} images/s, ratio {found[1] / found[0]:.3f}")
        ours.close()
    report(pairs, batch_size, num_threads, ("nvidia-dali-cuda130", "torch"), json_file)


if __name__ == "__main__":
    run_app(app)
