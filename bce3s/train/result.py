"""What a finished run reports, labelled as honest figures must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bce3s.metrics import Accuracy, FeatureGeometry


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The end of a run.

    Args:
        last: after the last epoch, without test-time augmentation: the headline, unless `selects`.
        last_flip_tta: the same weights with flip test-time augmentation.
        last_features: geometry of the same weights' classifier and features of `report_split`; None where it was not measured.
        best: of the checkpoint that was best on `selection_split`, after epoch `best_epoch` (from 0); None where its file is lost.
        last_average: of the moving average of the weights after the last epoch, None without one.
        selection_measure: the accuracy it was best by, "all" or "balanced".
        selects: `best` was asked for as the headline, chosen on val.
        report_split: where they were measured: "test", or "val" where there is no test split.
        images_per_s: source images in training, median over the run's epochs.
        data_wait_share: of training time, median over the run's epochs.
    """

    last: Accuracy
    last_flip_tta: Accuracy
    last_features: FeatureGeometry | None = None
    best: Accuracy | None
    best_epoch: int
    last_average: Accuracy | None
    selection_split: str
    selection_measure: str = "all"
    selects: bool = False
    report_split: str
    images_per_s: float
    data_wait_share: float

    @property
    def best_is_headline(self) -> bool:
        """Whether the selected epoch is the run's result; where its weights are lost, the last epoch stands in and is labelled so."""
        return self.selects and self.best is not None

    def rows(self) -> dict[str, Accuracy]:
        """Label → accuracies for a table, the headline first."""
        last = {"last epoch": self.last, "last epoch, flip TTA": self.last_flip_tta}
        if self.last_average is not None:
            last["last epoch, average of weights"] = self.last_average
        if self.best is None:
            return last
        if self.selects:
            return {f"selected on {self.selection_split}, epoch {self.best_epoch + 1}": self.best, **last}
        return {**last, f"best epoch on {self.selection_split} ({self.best_epoch + 1})": self.best}


def summary(result: RunResult) -> dict[str, Any]:
    """The result, ready for JSON; measurements of accuracy come first, the `headline` before the others."""
    measures: dict[str, Any] = {"last_epoch_no_tta": result.last.to_dict(), "last_epoch_flip_tta": result.last_flip_tta.headline()}
    if result.last_average is not None:
        measures["last_epoch_average_no_tta"] = result.last_average.headline()
    headline, best_name = "last_epoch_no_tta", f"best_on_{result.selection_split}_no_tta"
    if result.best is not None:
        best = result.best.to_dict() if result.best_is_headline else result.best.headline()
        measures[best_name] = {**best, "epoch": result.best_epoch}
    if result.best_is_headline:
        headline = best_name
        measures = {best_name: measures.pop(best_name), **measures}
    features = None if result.last_features is None else {"split": result.report_split, **result.last_features.figures()}
    return {
        **measures,
        "headline": headline,
        "selected_by": f"{result.selection_measure} on {result.selection_split}" if result.best_is_headline else None,
        "last_epoch_features": features,
        "split": result.report_split,
        "images_per_s": result.images_per_s,
        "data_wait_share": result.data_wait_share,
    }
