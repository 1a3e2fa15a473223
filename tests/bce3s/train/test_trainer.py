"""A run on real shards: it learns, leaves a whole record, and says in one sentence what stands in its way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bce3s.config import LossConfig
from bce3s.losses import LOSSES
from bce3s.runlog import read_metrics
from bce3s.throughput import waits
from bce3s.train import Trainer, TrainingError, summary
from pipelines.loaders import LOADERS
from pipelines.types import ConfigError
from tests.bce3s.train.runs import CONFIG, console, train


@pytest.mark.parametrize("loss", [loss if loss == "bce3s" else pytest.param(loss, marks=pytest.mark.slow) for loss in LOSSES])
def test_every_loss_learns_the_small_set(make_shards: Any, tmp_path: Path, loss: str) -> None:
    config = replace(CONFIG, epochs=8, eval_every=8, loss=LossConfig(name=loss))
    trainer = Trainer(config, make_shards(train=(60, 40, 30, 20)), tmp_path / "run", console())
    result = trainer.fit()
    trainer.close()
    # Four classes: chance is 25 %.
    assert (result.last.all or 0) > 50


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_trains_and_evaluates(make_shards: Any, tmp_path: Path, loader: str) -> None:
    if loader == "ffcv":
        pytest.importorskip("ffcv", reason="FFCV is not installed")
    config = replace(CONFIG, epochs=1, data=replace(CONFIG.data, loader=loader))
    trainer = Trainer(config, make_shards(val=2, beton=loader == "ffcv"), tmp_path / "run", console())
    result = trainer.fit()
    trainer.close()
    assert result.selection_split == "val"
    assert result.last.num_images == 20


def test_data_that_binds_is_said_once_with_the_knob(make_shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "BINDING_SHARE", -1.0)  # so that every epoch does
    told = console()
    trainer = Trainer(replace(CONFIG, epochs=2), make_shards(), tmp_path / "run", told)
    trainer.fit()
    trainer.close()
    assert told.file.getvalue().count("data binds: ") == 1  # type: ignore[attr-defined]
    epochs = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "epoch"]
    assert all(0 <= line["data_wait_share"] <= 1 and 0 <= line["ready_share"] <= 1 for line in epochs)


def test_a_run_leaves_a_whole_record(make_shards: Any, tmp_path: Path) -> None:
    shards = make_shards()
    train(CONFIG, shards, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best.safetensors",
        "checkpoints",
        "config.json",
        "environment.json",
        "metrics.jsonl",
    ]
    lines = read_metrics(tmp_path / "run")
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [0, 1, 2, 3]
    step_line = next(line for line in lines if line["kind"] == "step" and line["epoch"] == 2)
    assert {"images_per_s", "data_wait_share", "total", "joint", "contrastive", "uniform"} <= set(step_line)
    final = lines[-1]
    assert final["kind"] == "summary"
    assert set(final) >= {"last_epoch_no_tta", "last_epoch_flip_tta", "best_on_test_no_tta"}
    assert final["last_epoch_no_tta"]["all"] == next(line for line in lines if line["kind"] == "epoch" and line["epoch"] == 3)["all"]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["loss_floors"]["uniform"] < step_line["uniform"]
    assert Path(environment["shards"]) == shards.root


def test_overwriting_removes_the_old_checkpoints_before_the_first_epoch(make_shards: Any, tmp_path: Path) -> None:
    train(replace(CONFIG, epochs=1), make_shards(), tmp_path / "run")
    trainer = Trainer(replace(CONFIG, seed=1), make_shards(), tmp_path / "run", console())
    with torch.no_grad():
        trainer.model.classifier.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="nothing was saved yet"):
        trainer.fit()
    trainer.close()
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_an_unwritable_run_folder_is_one_sentence(make_shards: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = Trainer(CONFIG, make_shards(), tmp_path / "file" / "run", console())
    with pytest.raises(TrainingError, match="cannot write to"):
        trainer.fit()
    trainer.close()


def test_without_a_test_split_val_is_reported_and_labelled(make_shards: Any, tmp_path: Path) -> None:
    trainer = Trainer(replace(CONFIG, epochs=1), make_shards(val=3, test=0), tmp_path / "run", console())
    result = trainer.fit()
    trainer.close()
    assert (result.report_split, result.last.num_images) == ("val", 12)
    with pytest.raises(ConfigError, match="neither test nor val images"):
        Trainer(CONFIG, make_shards(val=0, test=0), tmp_path / "other", console())


def test_shards_of_another_dataset_are_refused_before_anything_is_built(make_shards: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds data set 'demo', not 'cifar10-lt'"):
        Trainer(CONFIG, make_shards(name="demo"), tmp_path / "run", console())


def test_summary_labels_what_it_reports(make_shards: Any, tmp_path: Path) -> None:
    trainer = Trainer(replace(CONFIG, epochs=1), make_shards(), tmp_path / "run", console())
    found = summary(trainer.fit())
    trainer.close()
    assert list(found)[:3] == ["last_epoch_no_tta", "last_epoch_flip_tta", "best_on_test_no_tta"]
