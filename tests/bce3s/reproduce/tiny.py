"""Shards that the small budget takes for those of its CIFAR-100 subset: 20 classes of few, drawn images, so that a run takes a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipelines.conversion import ExecutorOptions, WriteOptions, write_shards
from pipelines.conversion.orders import write_orders
from tests.conftest import small_dataset

COUNTS = [101, 25, *[2] * 18]  # one many-shot class, one medium-shot, the others few-shot


def tiny_shards(folder: Path, imbalance_factor: float = 100.0) -> Path:
    """Writes them to `folder`/cifar100-lt-if100-20classes and returns `folder`."""
    dataset = small_dataset({"train": COUNTS, "val": [0] * 20, "test": [4] * 20}, (32, 32), "png", "cifar100-lt")
    dataset = replace(dataset, options={"imbalance_factor": imbalance_factor, "subset": "first", "classes": 20})
    out = folder / "cifar100-lt-if100-20classes"
    write_shards(dataset, write_orders(dataset, 0), out, WriteOptions(executor=ExecutorOptions(num_processes=1)))
    return folder
