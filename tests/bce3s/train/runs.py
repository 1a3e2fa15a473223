"""Runs that the tests of training share: a small one in this process, and whole commands in processes that can be killed."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bce3s.checkpoint import load_checkpoint
from bce3s.config import ModelConfig, OptimizerConfig, TrainConfig
from bce3s.interrupt import StopRequest
from bce3s.train import StoppedError, Trainer, newest_checkpoint
from pipelines.config import AugmentConfig, DataConfig
from pipelines.format import ShardSet

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    dataset="cifar10-lt",
    epochs=4,
    precision="fp32",
    device="cpu",
    log_every=2,
    data=DataConfig(
        loader="resident", batch_size=16, image_size=16, num_threads=1, augment=AugmentConfig(area_range=(0.5, 1.0), eval_crop=1.0)
    ),
    model=ModelConfig(arch="resnet20-cifar", projection_dim=16),
    optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=5e-4, warmup_epochs=1),
)


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def train(
    config: TrainConfig, shards: ShardSet, out: Path, *, resume: bool = False, stop_at: Callable[[Trainer], bool] | None = None
) -> Trainer:
    """Trains to the end, or until a request to stop arrives at the first step where `stop_at` holds; then the run must have stopped."""
    trainer = Trainer(config, shards, out, console())
    if resume:
        trainer.resume()
    if stop_at is not None:
        trainer._stop = _StopAt(lambda: stop_at(trainer))
    try:
        trainer.fit()
        stopped = False
    except StoppedError:
        stopped = True
    finally:
        trainer.close()
    assert stopped == (stop_at is not None)
    return trainer


class _StopAt(StopRequest):
    """A request that arrives at a chosen place of the run instead of at a chosen time."""

    def __init__(self, arrived: Callable[[], bool]) -> None:
        self._arrived = arrived
        super().__init__()

    @property
    def name(self) -> str | None:
        return "SIGTERM" if self._arrived() else None

    @name.setter
    def name(self, value: str | None) -> None:
        pass


def weights(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_checkpoint(newest_checkpoint(out), CPU)["model"]
    return found


def assert_equal_states(first: Path, second: Path) -> None:
    """Model, optimizer, average and the loss sums of the newest checkpoints, to the last bit."""
    one, other = (_leaves(load_checkpoint(newest_checkpoint(out), CPU)) for out in (first, second))
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} differ: {', '.join(different[:5])}"


def _leaves(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {name: leaf for key, value in items for name, leaf in _leaves(value, f"{path}/{key}").items()}


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Returns once `condition` holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)
