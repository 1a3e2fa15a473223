"""Two ranks on one machine, in processes of their own that talk through gloo: together they see what one rank sees alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import AugmentConfig, DataConfig
from pipelines.format import open_shards
from pipelines.loaders import PlannedLoader, build_loader

ROOT = Path(__file__).resolve().parents[3]
CONFIG = {"batch_size": 8, "image_size": 32, "num_threads": 1, "augment": AugmentConfig(area_range=(0.3, 1.0))}


def loader_for(root: Path, loader: str, split: str, rank: int, world_size: int) -> PlannedLoader:
    config = DataConfig(loader=loader, **CONFIG)  # type: ignore[arg-type]
    return build_loader(open_shards(root), split, config, seed=3, device=torch.device("cpu"), rank=rank, world_size=world_size)


def seen_by(root: Path, loader: str, rank: int, world_size: int) -> dict[str, np.ndarray]:
    """Ids and pixels of two steps of training and of the whole evaluation."""
    training = loader_for(root, loader, "train", rank, world_size)
    batches = [batch for _, batch in zip(range(2), training.epoch(1, 3), strict=False)]
    evaluation = list(loader_for(root, loader, "test", rank, world_size).epoch(0))
    streams = [stream for batch in batches for stream in batch.images_SHWC.chunk(2)]
    return {
        "train_ids": np.concatenate([ids for batch in batches for ids in np.split(batch.ids_S, 2)]),
        "train_pixels": np.concatenate([stream.numpy() for stream in streams]),
        "test_ids": np.concatenate([batch.ids_S for batch in evaluation]),
        "test_labels": np.concatenate([batch.labels_S.numpy() for batch in evaluation]),
    }


def main(root: Path, loader: str, out: Path) -> None:
    """What each rank runs: gathers from both, and rank 0 keeps it."""
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, seen_by(root, loader, rank, world_size))
    if rank == 0:
        np.savez(out, **{f"{name}_{r}": value for r, seen in enumerate(gathered) for name, value in seen.items()})
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("loader", ["dali", pytest.param("resident", marks=pytest.mark.slow)])
def test_two_gloo_ranks_share_the_batches_of_one(make_shards: Any, tmp_path: Path, loader: str) -> None:
    root, out = make_shards(size=(48, 48), extension="jpg").root, tmp_path / "seen.npz"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, __file__, str(root), loader, str(out)]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    alone = seen_by(root, loader, 0, 1)
    with np.load(out) as pair:
        # Each stream of a batch lies half on either rank.
        for name in ("train_ids", "train_pixels"):
            halves = [pair[f"{name}_{rank}"].reshape(4, 4, *alone[name].shape[1:]) for rank in range(2)]
            np.testing.assert_array_equal(np.concatenate(halves, axis=1).reshape(alone[name].shape), alone[name])
        ids = np.concatenate([pair["test_ids_0"], pair["test_ids_1"]])
        labels = np.concatenate([pair["test_labels_0"], pair["test_labels_1"]])
    assert sorted(ids.tolist()) == list(range(20))
    np.testing.assert_array_equal(labels[np.argsort(ids)], alone["test_labels"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
