"""What every test shares: small real shards, where the real images lie, and `cuda` tests that skip themselves."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from pipelines.conversion import ExecutorOptions, WriteOptions, write_shards
from pipelines.format import ShardSet, open_shards
from pipelines.types import SPLITS, EncodedSample, OpenDataset, Split

# Small tensors gain nothing from a second thread, and on a busy machine its barriers cost tenfold. Sums in one order also let runs be
# compared bit for bit. Set before torch is imported, and inherited by every process a test starts.
os.environ["OMP_NUM_THREADS"] = "1"

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MakeShards = Callable[..., ShardSet]

# The first call of a compiled function takes a second, so no deadline; the same examples every time, so that a failure is a change.
settings.register_profile("house", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cuda_items = [item for item in items if item.get_closest_marker("cuda")]
    if not cuda_items:
        return
    import torch  # here, so that a run without such a test does not wait for it

    if not torch.cuda.is_available():
        for item in cuda_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def picture(label: int, number: int, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3]: smooth, so that JPEG keeps it, and different for every label and number."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (3 + label) + number) + np.cos(y / (4 + channel) + label) for channel in range(3)]
    return (127.5 + 60 * np.stack(waves, -1)).clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, extension: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if extension == "png" else "JPEG", quality=90)
    return buffer.getvalue()


def small_dataset(counts: dict[str, list[int]], size: tuple[int, int] | None, extension: str, name: str) -> OpenDataset:
    """Images of `size`, or of varying sizes from 40 to 79 px where None."""

    def split(split_name: str) -> Split:
        labels = np.repeat(np.arange(len(counts[split_name])), counts[split_name]).astype(np.int64)

        def read(i: int) -> EncodedSample:
            number = i + 1000 * SPLITS.index(split_name)
            height, width = size or (40 + number * 7 % 40, 40 + number * 11 % 40)
            pixels = picture(int(labels[i]), number, height, width)
            return EncodedSample(encoded=encode(pixels, extension), extension=extension, label=int(labels[i]), source=f"{split_name}#{i}")

        return Split(labels_N=labels, sources=[f"{split_name}#{i}" for i in range(len(labels))], read=read)

    class_names = tuple(f"class-{k}" for k in range(len(counts["train"])))
    return OpenDataset(name=name, class_names=class_names, splits={s: split(s) for s in SPLITS}, options={})


@pytest.fixture(scope="session")
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> MakeShards:
    """Writes and opens shards of a small generated data set; equal arguments share one folder."""
    made: dict[str, ShardSet] = {}

    def make(
        train: tuple[int, ...] = (40, 20, 9, 5),
        size: tuple[int, int] | None = (32, 32),
        extension: str = "png",
        name: str = "cifar10-lt",
        val: int = 0,
        test: int = 5,
        shard_bytes: int = 32 << 10,
        beton: bool = False,
    ) -> ShardSet:
        key = repr((train, size, extension, name, val, test, shard_bytes, beton))
        if key not in made:
            counts = {"train": list(train), "val": [val] * len(train), "test": [test] * len(train)}
            dataset = small_dataset(counts, size, extension, name)
            rng = np.random.default_rng(0)
            orders = {s: rng.permutation(len(dataset.splits[s].labels_N)).astype(np.int64) for s in SPLITS}
            out = tmp_path_factory.mktemp("shards") / name
            formats = ("wds", "ffcv") if beton else ("wds",)
            options = WriteOptions(shard_bytes=shard_bytes, formats=formats, executor=ExecutorOptions(num_processes=1))
            write_shards(dataset, orders, out, options)
            made[key] = open_shards(out)
        return made[key]

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real images are not at {SHARED_DATA}")
    return SHARED_DATA
