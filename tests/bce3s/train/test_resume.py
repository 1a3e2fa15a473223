"""Interrupted equals uninterrupted, to the last bit, wherever the run is stopped and whatever it keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bce3s.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from bce3s.config import CheckpointConfig, LossConfig, TrainConfig
from bce3s.runlog import read_metrics
from bce3s.train import Trainer, newest_checkpoint, require_same_record, saves
from pipelines.types import ConfigError
from tests.bce3s.train.runs import CONFIG, CPU, assert_equal_states, console, train, weights

# 74 training images in batches of 16: five steps an epoch.
KINDS = {
    "bce3s": CONFIG,
    "average-clip": replace(CONFIG, ema_decay=0.9, optimizer=replace(CONFIG.optimizer, clip_norm=1.0)),
    "micro-batches": replace(CONFIG, accumulate_steps=2),
    "adamw": replace(CONFIG, optimizer=replace(CONFIG.optimizer, name="adamw", learning_rate=1e-3)),
    "lars": replace(CONFIG, optimizer=replace(CONFIG.optimizer, name="lars")),
    "growing-images": replace(CONFIG, image_sizes="0:8,2:16"),
    "deterministic": replace(CONFIG, deterministic=True),
    "ce": replace(CONFIG, loss=LossConfig(name="ce")),
}
SLOW_KINDS = {"lars", "deterministic", "ce", "adamw"}


@pytest.fixture(autouse=True)
def _usual_kernels() -> Any:
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def at(epoch: int, step: int) -> Callable[[Trainer], bool]:
    def reached(trainer: Trainer) -> bool:
        cursor = trainer.state.cursor
        return (cursor.epoch, cursor.step) >= (epoch, step)

    return reached


def figures(run: Path) -> list[Any]:
    """What the log says of training, times and rates left out."""
    kept = ("kind", "epoch", "step", "total", "joint", "contrastive", "uniform", "all", "few")
    return [{name: line[name] for name in kept if name in line} for line in read_metrics(run) if line["kind"] != "summary"]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW_KINDS else kind for kind in KINDS])
def test_a_run_stopped_in_the_middle_of_an_epoch_continues_bit_for_bit(make_shards: Any, tmp_path: Path, kind: str) -> None:
    config = KINDS[kind]
    train(config, make_shards(), tmp_path / "whole")
    train(config, make_shards(), tmp_path / "parts", stop_at=at(0, 2))
    train(config, make_shards(), tmp_path / "parts", resume=True, stop_at=at(2, 3))
    train(config, make_shards(), tmp_path / "parts", resume=True)
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 11))
def test_a_run_stopped_after_any_step_continues_bit_for_bit(make_shards: Any, tmp_path: Path, step: int) -> None:
    config = replace(CONFIG, epochs=2)
    train(config, make_shards(), tmp_path / "whole")
    train(config, make_shards(), tmp_path / "parts", stop_at=lambda trainer: trainer.state.cursor.global_step >= step)
    if step < 10:
        assert load_checkpoint(newest_checkpoint(tmp_path / "parts"), CPU)["cursor"]["global_step"] == step
    train(config, make_shards(), tmp_path / "parts", resume=True)
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")


def test_a_request_during_the_evaluation_keeps_the_epoch_that_was_trained(make_shards: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=2)
    train(config, make_shards(), tmp_path / "whole")
    train(config, make_shards(), tmp_path / "parts", stop_at=lambda trainer: trainer.state.cursor.step == 5 and not trainer.model.training)
    cursor = load_checkpoint(newest_checkpoint(tmp_path / "parts"), CPU)["cursor"]
    assert (cursor["epoch"], cursor["step"], cursor["best_epoch"]) == (0, 5, -1)
    train(config, make_shards(), tmp_path / "parts", resume=True)
    assert_equal_states(tmp_path / "whole", tmp_path / "parts")
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def steps_saved(run: Path) -> list[int]:
    return [load_checkpoint(path, CPU)["cursor"]["global_step"] for path in sorted((run / "checkpoints").iterdir())]


@pytest.mark.parametrize(("every", "steps"), [("7steps", [7, 14, 20]), ("3epochs", [15, 20]), ("1h", [20])])
def test_checkpoints_come_at_the_interval(make_shards: Any, tmp_path: Path, every: str, steps: list[int]) -> None:
    """A save at the end always comes."""
    trainer = Trainer(replace(CONFIG, checkpoint=CheckpointConfig(every=every, keep=100)), make_shards(), tmp_path / "run", console())
    wait_for_each_save(trainer)
    trainer.fit()
    trainer.close()
    assert steps_saved(tmp_path / "run") == steps


def wait_for_each_save(trainer: Trainer) -> None:
    """So that none is put off because the one before is still being written."""
    save = trainer.saves.save

    def save_and_wait() -> None:
        save()
        trainer.saves._writer.wait()  # type: ignore[union-attr]

    trainer.saves.save = save_and_wait  # type: ignore[method-assign]


@pytest.mark.parametrize(("every", "steps"), [("10m", [2, 12, 20]), ("1h", [20])])
def test_checkpoints_come_by_the_clock(
    make_shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: str, steps: list[int]
) -> None:
    """A step takes a minute of this clock, and the first eight minutes pass before training."""
    trainer = Trainer(replace(CONFIG, checkpoint=CheckpointConfig(every=every, keep=100)), make_shards(), tmp_path / "run", console())
    wait_for_each_save(trainer)
    began_s = time.monotonic()
    monkeypatch.setattr(saves, "clock_s", lambda: began_s + 60.0 * (8 + trainer.state.cursor.global_step))
    trainer.fit()
    trainer.close()
    assert steps_saved(tmp_path / "run") == steps


def test_old_checkpoints_go(make_shards: Any, tmp_path: Path) -> None:
    train(replace(CONFIG, checkpoint=CheckpointConfig(every="1epoch", keep=2)), make_shards(), tmp_path / "run")
    assert len(steps_saved(tmp_path / "run")) == 2
    assert steps_saved(tmp_path / "run")[1] == 20


def test_best_weights_that_are_lost_are_left_out_and_said_so(make_shards: Any, tmp_path: Path) -> None:
    trainer = train(CONFIG, make_shards(val=3), tmp_path / "run")
    if trainer.state.cursor.best_epoch == 3:  # then its file is not read
        trainer.state.cursor.best_epoch = 1
        trainer.saves.folder.save(20, {**trainer.state.state_dict(), "rank_statistics": None})
    (tmp_path / "run" / "best.safetensors").unlink()
    told = console()
    again = Trainer(CONFIG, make_shards(val=3), tmp_path / "run", told)
    again.resume()
    result = again.fit()
    again.close()
    assert result.best is None
    assert "the best epoch is not reported: no checkpoint at" in told.file.getvalue()  # type: ignore[attr-defined]


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


def rewrite_settings(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the config that a run keeps, in its record and in its checkpoint."""
    path = newest_checkpoint(run)
    state = load_checkpoint(path, CPU)
    settings = json.loads(state["config"])
    change(settings)
    save_checkpoint(path, {**state, "config": json.dumps(settings)})
    (run / "config.json").write_text(json.dumps(settings))


def test_a_run_of_older_code_goes_on_with_the_defaults_of_what_it_did_not_know(make_shards: Any, tmp_path: Path) -> None:
    shards, run, config = make_shards(), tmp_path / "run", replace(CONFIG, epochs=1)
    train(config, shards, run)

    def forget(settings: dict[str, Any]) -> None:
        for group, names in ((settings, ("retrain", "select")), (settings["model"], ("classifier", "bias_prior"))):
            for name in names:
                del group[name]
        del settings["data"]["order"]["partner"]

    rewrite_settings(run, forget)
    require_same_record(run, config, shards)
    linear = replace(config, model=replace(config.model, classifier="linear"))
    trainer = Trainer(linear, shards, run, console())
    for refused in (trainer.resume, lambda: require_same_record(run, linear, shards)):
        with pytest.raises(ConfigError, match=r"was trained with model\.classifier='normalized', this command says 'linear'"):
            refused()
    trainer.close()
    train(config, shards, run, resume=True)


@pytest.mark.parametrize(("value", "reason"), [({"spin": 1}, r"unknown setting 'loss\.spin'"), ({"name": "gone"}, "unknown method 'gone'")])
def test_a_run_of_another_version_is_refused_in_one_sentence(make_shards: Any, tmp_path: Path, value: dict[str, Any], reason: str) -> None:
    shards, run, config = make_shards(), tmp_path / "run", replace(CONFIG, epochs=1)
    train(config, shards, run)
    rewrite_settings(run, lambda settings: settings["loss"].update(value))
    trainer = Trainer(config, shards, run, console())
    for refused in (trainer.resume, lambda: require_same_record(run, config, shards)):
        with pytest.raises(
            ConfigError, match=rf"was trained by another version of bce3s, .* \({reason}\): take that one, or another --out"
        ):
            refused()
    trainer.close()


def test_a_continuation_may_save_more_often(make_shards: Any, tmp_path: Path) -> None:
    train(CONFIG, make_shards(), tmp_path / "run", stop_at=at(1, 1))
    train(replace(CONFIG, checkpoint=CheckpointConfig(every="1steps", keep=3)), make_shards(), tmp_path / "run", resume=True)


def test_resume_passes_over_a_damaged_checkpoint_and_says_so(make_shards: Any, tmp_path: Path) -> None:
    train(CONFIG, make_shards(), tmp_path / "whole")
    train(CONFIG, make_shards(), tmp_path / "run", stop_at=at(2, 1))
    newest = newest_checkpoint(tmp_path / "run")
    newest.write_bytes(newest.read_bytes()[:5000])
    told = console()
    trainer = Trainer(CONFIG, make_shards(), tmp_path / "run", told)
    assert trainer.resume().global_step == 10  # the epoch before
    assert f"{newest} is damaged" in told.file.getvalue()  # type: ignore[attr-defined]
    trainer.fit()
    trainer.close()
    assert_equal_states(tmp_path / "whole", tmp_path / "run")


def test_resume_from_nothing_but_damaged_checkpoints_is_one_sentence(make_shards: Any, tmp_path: Path) -> None:
    train(replace(CONFIG, epochs=1), make_shards(), tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:5000])
    trainer = Trainer(replace(CONFIG, epochs=1), make_shards(), tmp_path / "run", console())
    with pytest.raises(CheckpointError, match="damaged"):
        trainer.resume()
    trainer.close()


def test_resume_refuses_another_precision(make_shards: Any, tmp_path: Path) -> None:
    config: TrainConfig = replace(CONFIG, epochs=1, precision="auto")
    train(config, make_shards(), tmp_path / "run")
    path = newest_checkpoint(tmp_path / "run")
    save_checkpoint(path, {**load_checkpoint(path, CPU), "precision": "fp16"})
    trainer = Trainer(config, make_shards(), tmp_path / "run", console())
    with pytest.raises(ConfigError, match="was trained in fp16, and this device would continue in"):
        trainer.resume()
    trainer.close()
