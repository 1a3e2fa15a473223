"""What a finished run reports, labelled as honest figures must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bce3s.metrics import Accuracy


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The end of a run.

    Args:
        last: after the last epoch, without test-time augmentation: the headline.
        last_flip_tta: the same weights with flip test-time augmentation.
        best: of the checkpoint that was best on `selection_split`, after epoch `best_epoch` (from 0); None where its file is lost.
        last_average: of the moving average of the weights after the last epoch, None without one.
        report_split: where they were measured: "test", or "val" where there is no test split.
        images_per_s: source images in training, median over the run's epochs.
        data_wait_share: of training time, median over the run's epochs.
    """

    last: Accuracy
    last_flip_tta: Accuracy
    best: Accuracy | None
    best_epoch: int
    last_average: Accuracy | None
    selection_split: str
    report_split: str
    images_per_s: float
    data_wait_share: float


def summary(result: RunResult) -> dict[str, Any]:
    """The result, ready for JSON."""
    average = {} if result.last_average is None else {"last_epoch_average_no_tta": result.last_average.headline()}
    headline = None if result.best is None else {**result.best.headline(), "epoch": result.best_epoch}
    best = {} if headline is None else {f"best_on_{result.selection_split}_no_tta": headline}
    return {
        "last_epoch_no_tta": result.last.to_dict(),
        "last_epoch_flip_tta": result.last_flip_tta.headline(),
        **average,
        **best,
        "split": result.report_split,
        "images_per_s": result.images_per_s,
        "data_wait_share": result.data_wait_share,
    }
