"""The geometry of features is left out, and said so, where the device has no room for it; the run keeps its accuracies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bce3s.config import ModelConfig
from bce3s.metrics import FeatureStatistics
from bce3s.runlog import read_metrics
from bce3s.train import Trainer, TrainingError
from tests.bce3s.retrain.stages import RETRAIN, retrain, train_stage_one
from tests.bce3s.train.runs import CONFIG, console

SMALL = replace(CONFIG, epochs=1, model=ModelConfig(arch="resnet8-cifar", projection_dim=4))
SENTENCE = "the geometry of the features is not reported: cpu has no room for it beside the training"


def full(*arguments: Any, **options: Any) -> None:
    """What a CUDA device without room says."""
    raise torch.OutOfMemoryError("CUDA out of memory.")


def finished(make_shards: Any, run: Path) -> tuple[dict[str, Any], str]:
    """The summary of a new run, and what it said."""
    told = console()
    trainer = Trainer(SMALL, make_shards(), run, told)
    trainer.fit()
    trainer.close()
    return read_metrics(run)[-1], told.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("moment", ["__init__", "add", "geometry"])
def test_a_full_device_costs_the_geometry_and_nothing_else(
    make_shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    with_room, said = finished(make_shards, tmp_path / "with-room")
    assert with_room["last_epoch_features"] is not None
    assert SENTENCE not in said
    monkeypatch.setattr(FeatureStatistics, moment, full)
    without, said = finished(make_shards, tmp_path / "without")
    assert without["last_epoch_features"] is None
    assert said.count(SENTENCE) == 1
    assert without["last_epoch_no_tta"] == with_room["last_epoch_no_tta"]


def test_a_device_without_room_for_the_evaluation_itself_is_still_an_error(make_shards: Any, tmp_path: Path) -> None:
    trainer = Trainer(SMALL, make_shards(), tmp_path / "run", console())
    trainer.model.features = full  # type: ignore[assignment]
    with pytest.raises(TrainingError, match="cpu ran out of memory at batch size 16"):
        trainer.fit()
    trainer.close()


def test_stage_two_ends_without_its_geometry_too(make_shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards()
    train_stage_one(shards, tmp_path / "run")
    monkeypatch.setattr(FeatureStatistics, "__init__", full)
    retrain(tmp_path / "run", shards, tmp_path / "two", replace(RETRAIN, epochs=1))
    assert read_metrics(tmp_path / "two")[-1]["last_epoch_features"] is None
