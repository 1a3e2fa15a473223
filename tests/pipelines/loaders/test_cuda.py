"""Every loader on a CUDA device: the plans, and so the batches, of the host; what was delivered stays what it was."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import AugmentConfig, DaliConfig, DataConfig
from pipelines.format import ShardSet, open_shards
from pipelines.loaders import LOADERS, MADE_UP_PIXELS, PlannedLoader, build_loader
from pipelines.types import Batch, DamagedSampleError

pytestmark = pytest.mark.cuda

CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")
NAMES = [name for name in (*LOADERS, "index") if name != "ffcv" or find_spec("ffcv")]


@pytest.fixture
def photos(make_shards: Any) -> ShardSet:
    shards: ShardSet = make_shards(size=(96, 80), extension="jpg", beton=find_spec("ffcv") is not None)
    return shards


def loader_for(shards: ShardSet, name: str, device: torch.device, split: str = "train") -> PlannedLoader:
    augment = AugmentConfig(area_range=(0.3, 1.0), color_jitter=(0.4, 0.4, 0.4))
    loader, feed = ("dali", "index") if name == "index" else (name, "memory")
    config = DataConfig(loader=loader, batch_size=16, image_size=64, augment=augment, dali=DaliConfig(feed=feed))
    return build_loader(shards, split, config, seed=3, device=device)


def collected(loader: PlannedLoader, start_step: int = 0) -> list[Batch]:
    batches = list(loader.epoch(1, start_step))
    torch.cuda.synchronize()
    loader.close()
    return batches


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_batches_are_those_of_the_host(photos: ShardSet, name: str, split: str) -> None:
    on_device, on_host = (collected(loader_for(photos, name, device, split)) for device in (CUDA, HOST))
    assert len(on_device) == len(on_host)
    for one, other in zip(on_device, on_host, strict=True):
        assert one.images_SHWC.device == one.labels_S.device == CUDA
        assert one.ids_S.tolist() == other.ids_S.tolist()
        assert one.labels_S.tolist() == other.labels_S.tolist()
        assert one.images_SHWC.shape == other.images_SHWC.shape
        if name not in MADE_UP_PIXELS:
            # The JPEG decoders of NVIDIA and of the host differ by a few levels; another crop or flip would by tens.
            difference = (one.images_SHWC.cpu().float() - other.images_SHWC.float()).abs().mean((1, 2, 3))
            assert difference.max() < 5


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MADE_UP_PIXELS])
def test_kept_batches_are_not_written_over_and_resume_is_exact(photos: ShardSet, name: str) -> None:
    """The first pass keeps every batch while later ones are decoded and the device is busy; the second takes them one by one."""
    noise = torch.randn(2048, 2048, device=CUDA)
    used, kept = loader_for(photos, name, CUDA), []
    for batch in used.epoch(1):
        kept.append(batch.images_SHWC)
        noise = noise @ noise / noise.norm()
    abandoned = used.epoch(0)
    next(abandoned)
    for step, images in enumerate(kept):
        [again] = [batch for batch in used.epoch(1, step) if batch.step == step]
        assert torch.equal(again.images_SHWC, images)
    used.close()


@pytest.mark.parametrize("name", ["dali", "index", "resident"])
def test_a_damaged_sample_is_named(photos: ShardSet, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(photos.root, tmp_path / "shards"))
    split = open_shards(root).split("train")
    with split.paths[int(split.shards_N[5])].open("r+b") as tar:
        tar.seek(int(split.offsets_N[5]) + int(split.sizes_N[5]) // 2)
        tar.write(bytes(int(split.sizes_N[5]) // 2 + 1))
    with pytest.raises(DamagedSampleError, match=r"sample 00000005 of \S+ does not decode"):
        collected(loader_for(open_shards(root), name, CUDA))
