"""Which epoch is the result: the last, or the best on val and then never one that test chose; and how the summary says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bce3s.checkpoint import load_checkpoint
from bce3s.config import ModelConfig
from bce3s.evaluate import evaluate
from bce3s.metrics import Accuracy
from bce3s.runlog import read_metrics
from bce3s.seeds import combine
from bce3s.train import BEST_CHECKPOINT, RunResult, Trainer, load_run, summary
from bce3s.train.selection import Selection, resolve_selection
from pipelines.loaders import build_loader
from pipelines.types import ConfigError
from tests.bce3s.train.runs import CONFIG, CPU, _StopAt, console

ON_VAL = replace(CONFIG, epochs=2, select="val", model=ModelConfig(arch="resnet8-cifar", projection_dim=4))
FIGURES = {"many": None, "medium": 50.0, "few": 20.0, "per_class": (70.0, 20.0), "num_images": 10}


def accuracy(overall: float, balanced: float = 0.0) -> Accuracy:
    return Accuracy(all=overall, balanced=balanced, **FIGURES)  # type: ignore[arg-type]


def result(**changes: Any) -> RunResult:
    figures: dict[str, Any] = {"last": accuracy(60.0), "last_flip_tta": accuracy(61.0), "best": accuracy(65.0), "last_average": None}
    places = {"best_epoch": 11, "selection_split": "val", "report_split": "test", "images_per_s": 1.0, "data_wait_share": 0.0}
    return RunResult(**{**figures, **places, **changes})


def test_the_epoch_that_was_best_on_val_is_the_headline_measured_on_test(make_shards: Any, tmp_path: Path) -> None:
    shards = make_shards(val=3)
    trainer = Trainer(ON_VAL, shards, tmp_path / "run", console())

    def none_is_better_later() -> bool:
        if trainer.state.cursor.epoch == 1:
            trainer.state.cursor.best_accuracy = 200.0
        return False

    trainer._stop = _StopAt(none_is_better_later)
    found = trainer.fit()
    trainer.close()
    assert found.best_epoch == 0
    assert next(iter(found.rows())) == "selected on val, epoch 1"
    lines = read_metrics(tmp_path / "run")
    assert (lines[-1]["headline"], lines[-1]["selected_by"]) == ("best_on_val_no_tta", "all on val")
    assert lines[-1]["best_on_val_no_tta"]["epoch"] == 0
    assert lines[-1]["best_on_val_no_tta"]["num_images"] == 20  # of test, not the 12 of val
    # Its weights, evaluated on test by themselves.
    config, placement, model = load_run(load_checkpoint(tmp_path / "run" / BEST_CHECKPOINT, CPU), "cpu")
    loader = build_loader(shards, "test", trainer.config.data, seed=0, device=CPU)
    again = evaluate(model, loader, trainer.train_counts_K, config.data.augment, placement, confidence="sigmoid")["plain"]
    loader.close()
    assert found.best == again
    assert not torch.equal(model.classifier.weight, trainer.model.classifier.weight)


@pytest.mark.parametrize(
    ("splits", "sentence"),
    [
        ({"val": 0}, "--select val needs a val split, and .* has none: make shards with one, or take --select last"),
        ({"val": 3, "test": 0}, "--select val needs a test split to report on, and .* has none"),
    ],
)
def test_a_selection_that_cannot_be_honest_is_refused_before_training(
    make_shards: Any, tmp_path: Path, splits: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Trainer(ON_VAL, make_shards(**splits), tmp_path / "run", console())
    assert not (tmp_path / "run").exists()


def test_an_imbalanced_val_split_decides_by_its_balanced_accuracy(make_shards: Any) -> None:
    head_heavy, fair = accuracy(80.0, balanced=40.0), accuracy(70.0, balanced=60.0)
    by_all, by_balanced = (Selection("val", "test", measure, True) for measure in ("all", "balanced"))
    assert by_all.score(head_heavy) > by_all.score(fair)
    assert by_balanced.score(fair) > by_balanced.score(head_heavy)
    shards = make_shards(val=3)
    assert resolve_selection(ON_VAL, shards).measure == "all"
    counts = {split: shards.class_counts(split) for split in ("train", "val")}
    shards_of_another = _Counted(shards, counts["train"])
    assert resolve_selection(ON_VAL, shards_of_another).measure == "balanced"  # type: ignore[arg-type]


class _Counted:
    """Shards whose val split is as long-tailed as their training split, as one that is held out of it is."""

    def __init__(self, shards: Any, counts_K: Any) -> None:
        self.root, self._shards, self._counts_K = shards.root, shards, counts_K

    def num_samples(self, split: str) -> int:
        return int(self._shards.num_samples(split))

    def class_counts(self, split: str) -> Any:
        return self._counts_K


def test_the_last_epoch_is_the_headline_unless_asked_otherwise() -> None:
    found = summary(result())
    assert found["headline"] == next(iter(found)) == "last_epoch_no_tta"
    assert found["selected_by"] is None
    assert list(result().rows()) == ["last epoch", "last epoch, flip TTA", "best epoch on val (12)"]
    assert "per_class" not in found["best_on_val_no_tta"]


def test_a_selected_epoch_leads_the_summary_and_the_table_of_seeds() -> None:
    found = summary(result(selects=True, selection_measure="balanced"))
    assert found["headline"] == next(iter(found)) == "best_on_val_no_tta"
    assert found["selected_by"] == "balanced on val"
    assert list(result(selects=True).rows()) == ["selected on val, epoch 12", "last epoch", "last epoch, flip TTA"]
    combined = combine({0: found, 1: found})
    assert next(iter(combined["figures"])) == "best_on_val_no_tta"


def test_where_the_selected_weights_are_lost_the_last_epoch_stands_in_under_its_own_name() -> None:
    lost = result(selects=True, best=None)
    assert summary(lost)["headline"] == "last_epoch_no_tta"
    assert next(iter(lost.rows())) == "last epoch"


def test_seeds_are_summed_up_with_their_calibration_and_features(make_shards: Any, tmp_path: Path) -> None:
    trainer = Trainer(replace(ON_VAL, epochs=1, select="last"), make_shards(), tmp_path / "run", console())
    found = summary(trainer.fit())
    trainer.close()
    combined = combine({0: found, 1: found})
    assert set(combined["figures"]) == {"last_epoch_no_tta", "last_epoch_flip_tta", "best_on_test_no_tta"}
    assert combined["figures"]["last_epoch_no_tta"]["ece"]["mean"] == pytest.approx(found["last_epoch_no_tta"]["ece"])
    assert found["last_epoch_features"]["split"] == "test"
    compactness = found["last_epoch_features"]["compactness"]["medium"]["mean"]
    assert combined["features"]["compactness.medium.mean"] == {"mean": pytest.approx(compactness), "sd": 0.0}
    assert combined["features"]["collapse.nc1"]["mean"] == pytest.approx(found["last_epoch_features"]["collapse"]["nc1"])
    assert combined["features"]["compactness.many.mean"] is None
