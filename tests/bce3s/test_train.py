"""A run on real shards: it learns, leaves a whole record, and continues bit for bit after kill -9."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bce3s.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from bce3s.config import LossConfig, ModelConfig, OptimizerConfig, TrainConfig
from bce3s.losses import LOSSES
from bce3s.runlog import read_metrics
from bce3s.throughput import waits
from bce3s.train import Trainer, TrainingError, summary
from pipelines.config import AugmentConfig, DataConfig
from pipelines.loaders import LOADERS
from pipelines.types import ConfigError

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    dataset="cifar10-lt",
    epochs=4,
    precision="fp32",
    device="cpu",
    log_every=2,
    data=DataConfig(loader="resident", batch_size=16, num_threads=1, augment=AugmentConfig(crop="pad", eval_crop=1.0)),
    model=ModelConfig(arch="resnet20-cifar", projection_dim=16),
    optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=5e-4, warmup_epochs=1),
)


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def train(config: TrainConfig, shards: Any, out: Path, *, resume: bool = False, stop_after: int | None = None) -> Trainer:
    trainer = Trainer(config, shards, out, console())
    if resume:
        trainer.resume()
    if stop_after is None:
        trainer.fit()
        trainer.close()
        return trainer

    class Stop(Exception):
        pass

    save = trainer._save

    def save_then_stop(epoch: int, accuracy: Any) -> None:
        save(epoch, accuracy)
        if epoch + 1 == stop_after:
            raise Stop

    trainer._save = save_then_stop  # type: ignore[method-assign]
    with pytest.raises(Stop):
        trainer.fit()
    trainer.close()
    return trainer


def weights(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_checkpoint(out / "last.pt", CPU)["model"]
    return found


def assert_equal_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


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
        "best.pt",
        "config.json",
        "environment.json",
        "last.pt",
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


@pytest.mark.parametrize("stop_after", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(make_shards: Any, tmp_path: Path, stop_after: int) -> None:
    train(CONFIG, make_shards(), tmp_path / "whole")
    train(CONFIG, make_shards(), tmp_path / "parts", stop_after=stop_after)
    train(CONFIG, make_shards(), tmp_path / "parts", resume=True)
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")

    def epoch_figures(run: str) -> list[tuple[float, ...]]:
        return [(line["epoch"], line["total"], line["all"]) for line in read_metrics(tmp_path / run) if line["kind"] == "epoch"]

    assert epoch_figures("whole") == epoch_figures("parts")


def test_resuming_twice_equals_uninterrupted(make_shards: Any, tmp_path: Path) -> None:
    train(CONFIG, make_shards(), tmp_path / "whole")
    train(CONFIG, make_shards(), tmp_path / "parts", stop_after=1)
    train(CONFIG, make_shards(), tmp_path / "parts", resume=True, stop_after=2)
    train(CONFIG, make_shards(), tmp_path / "parts", resume=True)
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")


def test_resuming_a_finished_run_only_evaluates(make_shards: Any, tmp_path: Path) -> None:
    train(replace(CONFIG, epochs=1), make_shards(), tmp_path / "run")
    before = weights(tmp_path / "run")
    train(replace(CONFIG, epochs=1), make_shards(), tmp_path / "run", resume=True)
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "run").items())
    summaries = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "summary"]
    assert len(summaries) == 1
    assert summaries[0]["images_per_s"] > 0


def test_resume_refuses_another_dataset_other_shards_and_another_config(make_shards: Any, tmp_path: Path) -> None:
    train(replace(CONFIG, epochs=1), make_shards(), tmp_path / "run")
    cases = [
        (make_shards(name="demo"), replace(CONFIG, epochs=1, dataset="demo"), "was trained on 'cifar10-lt', but .* holds 'demo'"),
        (make_shards(train=(30, 20, 9, 5)), replace(CONFIG, epochs=1), "manifests differ"),
        (make_shards(), replace(CONFIG, epochs=1, seed=5), "was trained with seed=0, this command says 5"),
        (make_shards(), replace(CONFIG, epochs=1, optimizer=replace(CONFIG.optimizer, momentum=0.5)), r"optimizer\.momentum=0\.9"),
    ]
    for shards, config, sentence in cases:
        trainer = Trainer(config, shards, tmp_path / "run", console())
        with pytest.raises(ConfigError, match=sentence):
            trainer.resume()
        trainer.close()


def test_resume_from_a_damaged_checkpoint_is_one_sentence(make_shards: Any, tmp_path: Path) -> None:
    train(replace(CONFIG, epochs=1), make_shards(), tmp_path / "run")
    path = tmp_path / "run" / "last.pt"
    path.write_bytes(path.read_bytes()[:5000])
    trainer = Trainer(replace(CONFIG, epochs=1), make_shards(), tmp_path / "run", console())
    with pytest.raises(CheckpointError, match="damaged"):
        trainer.resume()
    trainer.close()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(make_shards: Any, tmp_path: Path) -> None:
    train(CONFIG, make_shards(), tmp_path / "run", stop_after=1)
    trainer = Trainer(CONFIG, make_shards(), tmp_path / "run", console())
    trainer.resume()
    with torch.no_grad():
        trainer.model.classifier.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"is not finite in epoch 2; .*last\.pt holds epoch 1"):
        trainer.fit()
    trainer.close()
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values() if value.is_floating_point())


def test_overwriting_removes_the_old_checkpoints_before_the_first_epoch(make_shards: Any, tmp_path: Path) -> None:
    train(replace(CONFIG, epochs=1), make_shards(), tmp_path / "run")
    trainer = Trainer(replace(CONFIG, seed=1), make_shards(), tmp_path / "run", console())
    with torch.no_grad():
        trainer.model.classifier.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="nothing was saved yet"):
        trainer.fit()
    trainer.close()
    assert not list((tmp_path / "run").glob("*.pt"))


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


def test_resume_refuses_another_precision(make_shards: Any, tmp_path: Path) -> None:
    train(replace(CONFIG, epochs=1, precision="auto"), make_shards(), tmp_path / "run")
    path = tmp_path / "run" / "last.pt"
    state = load_checkpoint(path, CPU)
    save_checkpoint(path, {**state, "precision": "fp16"})
    trainer = Trainer(replace(CONFIG, epochs=1, precision="auto"), make_shards(), tmp_path / "run", console())
    with pytest.raises(ConfigError, match="was trained in fp16, and this device would continue in"):
        trainer.resume()
    trainer.close()


def test_shards_of_another_dataset_are_refused_before_anything_is_built(make_shards: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds data set 'demo', not 'cifar10-lt'"):
        Trainer(CONFIG, make_shards(name="demo"), tmp_path / "run", console())


def test_summary_labels_what_it_reports(make_shards: Any, tmp_path: Path) -> None:
    trainer = Trainer(replace(CONFIG, epochs=1), make_shards(), tmp_path / "run", console())
    found = summary(trainer.fit())
    trainer.close()
    assert list(found)[:3] == ["last_epoch_no_tta", "last_epoch_flip_tta", "best_on_test_no_tta"]


def test_kill_9_then_the_same_command_with_resume_equals_uninterrupted(make_shards: Any, tmp_path: Path) -> None:
    """A real process, a real SIGKILL somewhere after the first checkpoint."""
    shards = make_shards()
    command = [sys.executable, "-m", "bce3s.cli", "fast-train", "--dataset", "cifar10-lt", "--shards", str(shards.root)]
    command += [
        "--recipe",
        "cifar10lt_resnet20_40ep",
        "--epochs",
        "6",
        "--batch-size",
        "8",
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--resume",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    killed = [*command, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(killed, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 60
    while not (tmp_path / "killed" / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert load_checkpoint(tmp_path / "killed" / "last.pt", CPU)["epochs_done"] < 6
    finished = subprocess.run(killed, env=environment, capture_output=True, text=True, check=True)
    assert "continuing after epoch" in finished.stdout
    assert_equal_weights(tmp_path / "whole", tmp_path / "killed")
