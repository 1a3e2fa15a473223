"""Which epoch is the run's result, and where its weights are found again. Never chosen on the split that it is reported on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bce3s.checkpoint import CheckpointError, load_checkpoint
from bce3s.config import TrainConfig
from bce3s.metrics import Accuracy
from bce3s.train.build import BEST_CHECKPOINT
from bce3s.train.saves import Saves
from pipelines.format import ShardSet
from pipelines.types import ConfigError


@dataclass(frozen=True)
class Selection:
    """How epochs are compared.

    Args:
        split: on which each evaluated epoch is measured: "val" where there is one.
        report_split: of the run's figures: "test" where there is one.
        measure: the accuracy that decides: "all", or "balanced" where `split` is not; there the head would decide for all classes.
        selects: whether the best epoch is the headline, else the last.
    """

    split: str
    report_split: str
    measure: str
    selects: bool

    def score(self, accuracy: Accuracy) -> float:
        """What an epoch is compared by, in percent."""
        return getattr(accuracy, self.measure) or 0.0


def resolve_selection(config: TrainConfig, shards: ShardSet) -> Selection:
    """The rule for a run on these shards.

    Raises:
        ConfigError: nothing to evaluate on, or an epoch is to be selected on val without a val split, or without a test split beside it.
    """
    report_split = next((split for split in ("test", "val") if shards.num_samples(split)), "")
    if not report_split:
        raise ConfigError(f"{shards.root} has neither test nor val images to evaluate on; make shards that have")
    has_val, selects = bool(shards.num_samples("val")), config.select == "val"
    if selects and not has_val:
        raise ConfigError(f"--select val needs a val split, and {shards.root} has none: make shards with one, or take --select last")
    if selects and report_split == "val":
        raise ConfigError(
            f"--select val needs a test split to report on, and {shards.root} has none: make shards with one, or take --select last"
        )
    split = "val" if has_val else report_split
    is_balanced = len(set(shards.class_counts(split).tolist())) == 1
    return Selection(split, report_split, "all" if is_balanced else "balanced", selects)


def best_weights(saves: Saves, out: Path, best_epoch: int, say: Callable[[str], None]) -> dict[str, torch.Tensor] | None:
    """The weights of the best epoch, from this process's memory, or from the file of run folder `out` if it is of that epoch.

    None where they are lost; `say` is then told why.
    """
    weights, path = saves.best_weights(), out / BEST_CHECKPOINT
    if weights is not None:
        return weights
    try:
        state = load_checkpoint(path, torch.device("cpu"))
    except CheckpointError as error:
        say(f"the best epoch is not reported: {error}")
        return None
    if state["cursor"]["best_epoch"] != best_epoch:
        say(f"the best epoch is not reported: {path} holds the weights of another one")
        return None
    found: dict[str, torch.Tensor] = state["model"]
    return found
