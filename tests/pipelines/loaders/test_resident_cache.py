"""Decoded images on disk: reused, never trusted unless whole, never in the way of a run."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import AugmentConfig, DataConfig, ResidentConfig
from pipelines.format import ShardSet, open_shards
from pipelines.loaders import build_loader, resident_fill
from pipelines.loaders.planned import PixelRequest
from pipelines.loaders.resident_cache import AUTO_MIN_BYTES, HEADER_BYTES, begin_draft, cache_file, open_cached

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


def config_for(cache: Path | str, **changes: Any) -> DataConfig:
    settings = {"loader": "resident", "batch_size": 16, "image_size": 32, "num_threads": 2, "resident": ResidentConfig(cache=str(cache))}
    return DataConfig(**(settings | changes))


def first_batch(shards: ShardSet, cache: Path | str, **changes: Any) -> torch.Tensor:
    loader = build_loader(shards, "train", config_for(cache, **changes), seed=0, device=CPU)
    images = next(iter(loader.epoch(0))).images_SHWC.clone()
    loader.close()
    return images


def request_for(shards: ShardSet, cache: Path | str, split: str = "train") -> PixelRequest:
    return PixelRequest(
        shards=shards, split=shards.split(split), config=config_for(cache), training=True, device=CPU, rank=0, world_size=1, seed=0
    )


@pytest.fixture
def shards(make_shards: Any, tmp_path: Path) -> ShardSet:
    """A copy, so that tests can damage it."""
    root = tmp_path / "shards"
    shutil.copytree(make_shards(size=None, extension="jpg").root, root)
    return open_shards(root)


def blank_tars(shards: ShardSet) -> None:
    """Every tar full of zeros, of the same length: whoever decodes fails."""
    for path in shards.root.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))


def test_a_second_run_decodes_nothing_and_sees_the_same_pixels(shards: ShardSet, tmp_path: Path) -> None:
    cache = tmp_path / "made" / "cache"
    first = first_batch(shards, cache)
    assert len(list(cache.iterdir())) == 1
    blank_tars(shards)
    assert torch.equal(first_batch(open_shards(shards.root), cache), first)


@pytest.mark.parametrize("damage", ["cut", "grown", "foreign", "empty"])
def test_a_damaged_file_is_made_again(shards: ShardSet, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    first = first_batch(shards, cache)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    wrong = {"cut": whole[:-1], "grown": whole + b"\0", "foreign": b"X" + whole[1:], "empty": b""}[damage]
    path.write_bytes(wrong)
    assert torch.equal(first_batch(shards, cache), first)
    assert path.read_bytes() == whole


def test_what_pixels_depend_on_is_in_the_name(shards: ShardSet, make_shards: Any, tmp_path: Path) -> None:
    other = make_shards(size=(32, 32), extension="jpg")
    files = [
        cache_file(request_for(shards, tmp_path), 50, 100),
        cache_file(request_for(shards, tmp_path), 51, 100),
        cache_file(request_for(shards, tmp_path, "test"), 50, 100),
        cache_file(request_for(other, tmp_path), 50, 100),
    ]
    assert len({file.path for file in files if file}) == len({file.header for file in files if file}) == 4
    assert all(len(file.header) == HEADER_BYTES for file in files if file)


def test_auto_keeps_large_sets_beside_their_shards_and_off_keeps_none(shards: ShardSet) -> None:
    large = cache_file(request_for(shards, "auto"), 50, AUTO_MIN_BYTES)
    assert large is not None
    assert large.path.parent == shards.root.parent / "shards.resident"
    assert cache_file(request_for(shards, "auto"), 50, AUTO_MIN_BYTES - 1) is None
    assert cache_file(request_for(shards, "off"), 50, 10 * AUTO_MIN_BYTES) is None


def test_a_long_fill_says_what_is_kept_and_where(
    shards: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    first_batch(shards, tmp_path / "cache")
    assert not caplog.messages
    monkeypatch.setattr("pipelines.loaders.resident._TELLING_BYTES", 1)
    first_batch(shards, tmp_path / "other")
    begun, ended = caplog.messages
    assert begun == f"decoding 74 images of 'train' once: 0.0 GiB at shorter side 37, kept in memory and {tmp_path / 'other'}"
    assert ended == "decoded 74 images of 'train' in 0 s"


def test_a_full_disk_costs_a_line_and_not_the_run(shards: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = first_batch(shards, "off")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        found = first_batch(shards, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(found, expected)
    assert "cannot be written (File too large)" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_made_costs_a_line_and_not_the_run(
    shards: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert torch.equal(first_batch(shards, tmp_path / "file" / "cache"), first_batch(shards, "off"))
    assert "cannot be written (Not a directory)" in caplog.text


def test_a_draft_becomes_a_file_only_when_published(shards: ShardSet, tmp_path: Path) -> None:
    cache = cache_file(request_for(shards, tmp_path), 50, 10_000)
    assert cache is not None
    draft = begin_draft(cache)
    assert draft is not None
    assert draft.path.stat().st_blocks * 512 >= HEADER_BYTES + 10_000  # its room is taken before anything is decoded
    draft.pixels_P[:] = 7
    assert open_cached(cache) is None
    draft.publish()
    mapped = open_cached(cache)
    assert mapped is not None
    assert (mapped == 7).all()
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    other = begin_draft(cache)
    assert other is not None
    other.discard()
    assert sorted(path for path in tmp_path.iterdir() if path.is_file()) == [cache.path]
    assert (draft.pixels_P == 7).all()


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from pipelines.config import DataConfig, ResidentConfig
from pipelines.format import open_shards
from pipelines.loaders import build_loader, resident_fill
if sys.argv[3] == "die":
    decode = resident_fill.decode_split
    def dying(request, sizes, put, skip):
        def last(start, pixels):
            put(start, pixels)
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(request, sizes, last, skip)
    resident_fill.decode_split = dying
config = DataConfig(loader="resident", batch_size=16, image_size=32, num_threads=1, resident=ResidentConfig(cache=sys.argv[2]))
loader = build_loader(open_shards(Path(sys.argv[1])), "train", config, seed=0, device=torch.device("cpu"))
print(int(next(iter(loader.epoch(0))).images_SHWC.long().sum()))
loader.close()
"""


def start_child(shards: ShardSet, cache: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(shards.root), str(cache), how]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_while_filling_leaves_nothing_that_is_trusted(shards: ShardSet, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    killed = start_child(shards, cache, "die")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (draft,) = cache.iterdir()
    assert draft.name.endswith(".partial")
    assert torch.equal(first_batch(shards, cache), first_batch(shards, "off"))
    (path,) = cache.iterdir()
    assert path.suffix == ".resident"


def test_of_two_at_once_one_decodes_and_both_read_it(shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks belong to open files, so two threads meet as two processes do."""
    decoded = []
    decode = resident_fill.decode_split

    def counting(*arguments: Any) -> Any:
        decoded.append(threading.get_ident())
        return decode(*arguments)

    monkeypatch.setattr(resident_fill, "decode_split", counting)
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: first_batch(shards, cache), range(2))
    assert torch.equal(first, second)
    assert len(decoded) == 1
    assert len(list(cache.iterdir())) == 1


@pytest.mark.slow
def test_two_processes_at_once_deliver_the_same(shards: ShardSet, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ended = [child.communicate() for child in [start_child(shards, cache, "live") for _ in range(2)]]
    expected = int(first_batch(shards, "off").long().sum())
    assert [out for out, _ in ended] == [f"{expected}\n"] * 2, ended
    assert [path.suffix for path in cache.iterdir()] == [".resident"]


def test_pad_crops_keep_their_images_whatever_min_side_says(make_shards: Any, tmp_path: Path) -> None:
    """They are drawn from images of exactly image_size; smaller ones would be framed in black."""
    augment = AugmentConfig(crop="pad", eval_crop=1.0)
    plain, asked = (
        first_batch(make_shards(), "off", augment=augment, resident=ResidentConfig(min_side=side, cache="off")) for side in (0, 16)
    )
    assert torch.equal(plain, asked)
    assert np.prod(plain.shape) == 32 * 32 * 32 * 3
