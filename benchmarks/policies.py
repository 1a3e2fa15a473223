"""RandAugment on a CPU: our compiled loops, the same in torch's whole-batch operations, and NVIDIA DALI's `rand_augment`.

python benchmarks/policies.py --images DIR [--json FILE]

All take the same photographs, decoded before and resized to 224 px, two of the same 14 operations an image at magnitude 9 of 30, in
batches of the same size with the same threads. They take turns, `--rounds` times; ratios are taken round by round. DALI runs with nearest
sampling, as we sample, and with its default, bilinear; a DALI pipeline that only hands the batch through is the hand-over's share. Beside
images/s stands processor time an image, over all threads, which other programs on the machine disturb less.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import nvidia.dali
import torch
import typer
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.auto_aug import rand_augment
from photographs import photographs
from PIL import Image
from turns import current_commit

from bce3s.cli import run_app
from pipelines.augment.policies import apply_policy, apply_reference, draw_policy
from pipelines.randomness import position_keys

SIDE = 224
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def load_batch(folder: Path, batch_size: int) -> NDArray[np.uint8]:
    """uint8 [S, 224, 224, 3]: the first JPEGs of a folder, over again where there are too few."""
    images = [np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE))) for path in photographs(folder)[:batch_size]]
    return np.stack(list(itertools.islice(itertools.cycle(images), batch_size)))


def dali_pipeline(images_SHWC: NDArray[np.uint8], num_threads: int, interpolation: Any | None) -> Any:
    """A pipeline that applies RandAugment to the batch again and again; None hands it through."""
    # Nothing ahead of time: a queue would give DALI its first batches for free and work on during our turns.
    in_turn = {"exec_async": False, "exec_pipelined": False, "exec_dynamic": False, "prefetch_queue_depth": 1}

    @pipeline_def(batch_size=len(images_SHWC), num_threads=num_threads, device_id=None, enable_conditionals=True, seed=0, **in_turn)
    def augmented() -> Any:
        images = fn.external_source(source=lambda: images_SHWC, batch=True, no_copy=True, layout="HWC")
        if interpolation is not None:
            images = rand_augment.rand_augment(
                images, n=2, m=9, shape=(SIDE, SIDE), fill_value=128, interp_type=interpolation, max_translate_rel=150 / 331
            )
        return images

    pipeline = augmented()
    pipeline.build()
    return pipeline


def ours(images_SHWC: NDArray[np.uint8], apply: Callable[..., torch.Tensor]) -> Callable[[], object]:
    """One batch a call, with a draw of its own."""
    images, epochs = torch.from_numpy(images_SHWC), itertools.count()
    positions = np.arange(len(images))
    return lambda: apply(images, draw_policy("randaugment", position_keys(next(epochs), positions)))


@app.command()
def main(
    images: Annotated[Path, typer.Option(help="Folder of photographs (JPEG).")],
    rounds: Annotated[int, typer.Option(help="Measurements of each side.")] = 9,
    batches: Annotated[int, typer.Option(help="Batches a measurement.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Images a batch.")] = 128,
    threads: Annotated[int, typer.Option(help="Threads of each side; 0 is one per core.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure and print images/s and ratios to DALI with nearest sampling."""
    num_threads = threads or os.cpu_count() or 1
    torch.set_num_threads(num_threads)
    images_SHWC = load_batch(images, batch_size)
    # DALI's own suite uses operators whose names DALI has deprecated.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sides: dict[str, Callable[[], object]] = {
        "dali, nearest": dali_pipeline(images_SHWC, num_threads, types.INTERP_NN).run,
        "dali, bilinear": dali_pipeline(images_SHWC, num_threads, types.INTERP_LINEAR).run,
        "dali, hand-over only": dali_pipeline(images_SHWC, num_threads, None).run,
        "ours, compiled": ours(images_SHWC, apply_policy),
        "ours, torch operations": ours(images_SHWC, apply_reference),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    processor_ms: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            started_s, started_processor_s = time.perf_counter(), time.process_time()
            for _ in range(batches):
                run()
            if turn:  # the first compiles ours and gets DALI its memory
                rates[name].append(batches * batch_size / (time.perf_counter() - started_s))
                processor_ms[name].append((time.process_time() - started_processor_s) * 1e3 / (batches * batch_size))
    report(rates, processor_ms, num_threads, batch_size, json_file)


def report(
    rates: dict[str, list[float]], processor_ms: dict[str, list[float]], num_threads: int, batch_size: int, json_file: Path | None
) -> None:
    """Prints medians and ranges, and writes them as JSON."""
    sides = {}
    for name, found in rates.items():
        ratios = [one / dali for one, dali in zip(found, rates["dali, nearest"], strict=True)]
        sides[name] = {
            "images_per_s_median": statistics.median(found),
            "processor_ms_per_image_median": statistics.median(processor_ms[name]),
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
        spread = f"{statistics.median(ratios):5.2f} × DALI ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:24} {statistics.median(found):8.0f} images/s, {spread}, {statistics.median(processor_ms[name]):.3f} ms of processor")
    if json_file is not None:
        commit = current_commit()
        figures = {
            "n": len(rates["dali, nearest"]),
            "sides": sides,
            "threads": num_threads,
            "batch": batch_size,
            "dali": nvidia.dali.__version__,
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "commit": commit,
        }
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run_app(app)
