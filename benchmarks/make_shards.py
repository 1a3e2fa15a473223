"""Speed of the shard converter as ratios to what a user would otherwise run, or to what the machine can do at most.

python benchmarks/make_shards.py --images DIR [--repeat 10] [--rounds 5] [--json FILE]

Every file of DIR is linked `--repeat` times into class folders. All sides use all cores, read from the page cache and take turns, so that a
machine whose speed drifts slows both; ratios are taken round by round. The sides:

    decode    bare libjpeg-turbo (simplejpeg, full RGB decode) in one process a core, nothing written: a ceiling for whatever validates
    tar       GNU tar, once as it is and once with an fsync of its result, which the converter always does
    pillow    one process a core: Pillow decode, Lanczos to 256, JPEG quality 90, webdataset.ShardWriter
    ffcv      bare DatasetWriter, one worker a core, Pillow decode, JPEG quality 90
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import simplejpeg
import typer
from PIL import Image

from bce3s.cli import run_app
from pipelines.conversion import ExecutorOptions, WriteOptions, write_shards
from pipelines.datasets import DatasetOptions, open_dataset
from pipelines.format import PixelOptions
from pipelines.types import SPLITS, DatasetError, OpenDataset

CORES = len(os.sched_getaffinity(0))
SIDE, QUALITY, SHARD_BYTES = 256, 90, 16 << 20
NUM_CLASSES = 20
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def link_images(images: Path, folder: Path, repeat: int) -> list[str]:
    """Links every image `repeat` times into class folders; returns the links."""
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise DatasetError(f"{images} holds no JPEG files")
    links = []
    for number, file in enumerate(files):
        for copy in range(repeat):
            link = folder / f"class{number % NUM_CLASSES:02d}" / f"{number:05d}-{copy:03d}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
            links.append(str(link))
    return links


def on_all_cores(work: Callable[[tuple[int, list[str], str]], None], files: list[str], out: str = "") -> None:
    """`work((number, its share of files, out))` in one process a core."""
    with ProcessPoolExecutor(CORES, get_context("fork")) as pool:
        list(pool.map(work, [(number, files[number::CORES], out) for number in range(CORES)]))


def decode_share(share: tuple[int, list[str], str]) -> None:
    """Reads and decodes, and keeps nothing."""
    for file in share[1]:
        simplejpeg.decode_jpeg(Path(file).read_bytes())


def pillow_share(share: tuple[int, list[str], str]) -> None:
    """The script one finds in tutorials."""
    import webdataset

    number, files, out = share
    with webdataset.ShardWriter(f"{out}/{number}-%06d.tar", maxsize=SHARD_BYTES, verbose=0) as writer:
        for position, file in enumerate(files):
            image = Image.open(file).convert("RGB")
            scale = SIDE / min(image.size)
            shrunk = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            shrunk.save(buffer, "JPEG", quality=QUALITY)
            writer.write({"__key__": f"{number}-{position:08d}", "jpg": buffer.getvalue(), "cls": int(Path(file).parent.name[5:])})


class PillowPixels:
    """What FFCV's own documentation feeds its writer: an indexable of (image, label)."""

    def __init__(self, files: list[str]) -> None:
        """Opens nothing yet."""
        self._files = files

    def __len__(self) -> int:
        """N."""
        return len(self._files)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        """uint8 [H, W, 3] and the label."""
        file = self._files[position]
        return np.asarray(Image.open(file).convert("RGB")), int(Path(file).parent.name[5:])


def bare_ffcv(files: list[str], out: Path) -> None:
    """FFCV as its documentation shows it."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=QUALITY), "label": IntField()}
    with redirect_stderr(io.StringIO()):  # its progress bar
        DatasetWriter(str(out / "bare.beton"), fields, num_workers=CORES).from_indexed_dataset(PillowPixels(files))


def ours(dataset: OpenDataset, out: Path, formats: tuple[str, ...] = ("wds",), **pixels: Any) -> None:
    """The converter as the command line calls it, without the start of Python."""
    orders = {split: np.arange(len(dataset.splits[split].labels_N)) for split in SPLITS}
    options = WriteOptions(
        shard_bytes=SHARD_BYTES, formats=formats, pixels=PixelOptions(**pixels), executor=ExecutorOptions(num_processes=CORES)
    )
    write_shards(dataset, orders, out / "shards", options)


def synced(command: list[str], file: Path, sync: bool) -> None:
    """Runs `command`; with `sync`, until `file` is on disk."""
    subprocess.run(command, check=True)
    if sync:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def sides(files: list[str], root: Path, dataset: OpenDataset, out: Path) -> dict[str, Callable[[], None]]:
    """Every side by name, in the order in which they take turns."""
    # Links to one file would become hard links in the archive, a few bytes each.
    tar = ["tar", "--hard-dereference", "-chf", str(out / "bare.tar"), "-C", str(root), "."]
    return {
        "decode": lambda: on_all_cores(decode_share, files),
        "ours keep": lambda: ours(dataset, out),
        "tar": lambda: synced(tar, out / "bare.tar", sync=False),
        "tar + fsync": lambda: synced(tar, out / "bare.tar", sync=True),
        "ours keep no-validate": lambda: ours(dataset, out, validate=False),
        "pillow": lambda: on_all_cores(pillow_share, files, str(out)),
        "ours min-side 256": lambda: ours(dataset, out, min_side=SIDE, quality=QUALITY),
        "ffcv": lambda: bare_ffcv(files, out),
        "ours wds,ffcv": lambda: ours(dataset, out, formats=("wds", "ffcv")),
    }


RATIOS = {
    "keep, validated / decode ceiling": ("ours keep", "decode", 0.9),
    "keep, no-validate / tar": ("ours keep no-validate", "tar", 0.7),
    "keep, no-validate / tar + fsync": ("ours keep no-validate", "tar + fsync", 0.7),
    "min-side 256 / Pillow + ShardWriter": ("ours min-side 256", "pillow", 1.5),
    "wds,ffcv / bare DatasetWriter": ("ours wds,ffcv", "ffcv", 1.0),
}


def measure(files: list[str], root: Path, scratch: Path, rounds: int) -> dict[str, list[float]]:
    """images/s of every side, a list of `rounds`; one round before is thrown away (page cache, compiled functions)."""
    dataset = open_dataset("folder", DatasetOptions(source=root, val_fraction=0.0, test_fraction=0.0))
    rates: dict[str, list[float]] = {}
    for round_number in range(rounds + 1):
        for name, side in sides(files, root, dataset, scratch / "out").items():
            shutil.rmtree(scratch / "out", ignore_errors=True)
            (scratch / "out").mkdir()
            os.sync()  # what the side before wrote is not this one's to wait for
            started_s = time.perf_counter()
            side()
            elapsed_s = time.perf_counter() - started_s
            if round_number:
                rates.setdefault(name, []).append(len(files) / elapsed_s)
            print(f"round {round_number} {name}: {len(files) / elapsed_s:,.0f} images/s", file=sys.stderr)
    return rates


@app.command()
def main(
    images: Annotated[Path, typer.Option(help="A folder of JPEG files.")],
    repeat: Annotated[int, typer.Option(help="Links to each file.")] = 10,
    rounds: Annotated[int, typer.Option(help="Turns of each side.")] = 5,
    scratch: Annotated[Path | None, typer.Option(help="Where to write; a few GB.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to save the figures.")] = None,
) -> None:
    """Measures every side and prints rates and ratios."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        files = link_images(images, Path(folder) / "images", repeat)
        rates = measure(files, Path(folder) / "images", Path(folder), rounds)
    print(f"{len(files):,} images, {CORES} cores, {platform.processor() or platform.machine()}, {rounds} rounds")
    for name, values in rates.items():
        print(f"{name:40s} {statistics.median(values):8,.0f} images/s  [{min(values):,.0f}–{max(values):,.0f}]")
    figures: dict[str, Any] = {"rates": rates, "ratios": {}}
    for name, (side, base, asked) in RATIOS.items():
        values = [one / other for one, other in zip(rates[side], rates[base], strict=True)]
        figures["ratios"][name] = values
        print(f"{name:40s} {statistics.median(values):8.2f}           [{min(values):.2f}–{max(values):.2f}]  asked: ≥ {asked}")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_app(app)
