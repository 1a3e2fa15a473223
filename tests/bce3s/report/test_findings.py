"""What is read and measured of runs that were really trained: whole, stopped, of an older format, without their shards."""

from __future__ import annotations

import json
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bce3s.checkpoint import CheckpointError
from bce3s.cli import app
from bce3s.config import ModelConfig, RetrainConfig
from bce3s.metrics import FeatureStatistics
from bce3s.report.findings import Findings, Note, RunFindings
from bce3s.report.measure import measure
from bce3s.report.read import MEASURED, Asked, read_findings
from bce3s.runlog import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE
from bce3s.seeds import summary_of
from bce3s.train import open_network
from pipelines.augment.mix import channel_statistics, normalise
from pipelines.format import ShardSet, open_shards
from pipelines.loaders import build_loader
from pipelines.types import BackendError, ConfigError, ShardError, UserError
from tests.bce3s.retrain.stages import retrain
from tests.bce3s.train.runs import CONFIG, train
from tests.conftest import MakeShards

SMALL = replace(CONFIG, epochs=2, model=ModelConfig(arch="resnet8-cifar", projection_dim=8))
READ_ONLY = Asked(model=False)
ON_CPU = Asked(device="cpu")


@pytest.fixture(scope="module")
def shards(make_shards: MakeShards, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """No class has more than 100 training images: the many-shot group is empty."""
    folder = tmp_path_factory.mktemp("of-the-run") / "shards"
    shutil.copytree(make_shards().root, folder)
    return open_shards(folder)


@pytest.fixture(scope="module")
def trained(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "ours"
    train(SMALL, shards, run)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(trained, tmp_path / "ours"))


def only(findings: Findings) -> RunFindings:
    (found,) = findings.runs
    return found


def notes_of(found: RunFindings, section: str) -> list[str]:
    return [note.sentence for note in found.notes if note.section == section]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_summary(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    *lines, last = (run / METRICS_FILE).read_text().splitlines()
    summary = json.loads(last)
    change(summary)
    (run / METRICS_FILE).write_text("\n".join([*lines, json.dumps(summary)]) + "\n")


def without_summary(run: Path) -> None:
    lines = (run / METRICS_FILE).read_text().splitlines()
    (run / METRICS_FILE).write_text("\n".join(lines[:-1]) + "\n")


def test_a_finished_run(trained: Path, shards: ShardSet) -> None:
    steps: list[tuple[str, int, int]] = []
    opened: list[Path | str] = []
    asked = Asked(device="cpu", on_step=lambda *step: steps.append(step), on_open=opened.append)
    found, summary = only(read_findings([trained, trained], asked)), summary_of(trained)
    assert (found.name, found.title, found.complete) == ("ours", "BCE3S, resnet8-cifar, cifar10-lt", True)
    assert (found.headline, next(iter(found.measurements)), found.split) == ("last_epoch_no_tta", "last_epoch_no_tta", "test")
    for label, measures in found.measurements.items():
        assert measures == {name: summary[label][name] for name in measures}
    assert found.measurements[found.headline]["many"] is None
    assert found.measurement_epochs == {"best_on_test_no_tta": summary["best_on_test_no_tta"]["epoch"] + 1}
    assert list(found.per_class_K) == summary["last_epoch_no_tta"]["per_class"]
    assert (found.class_counts_K, found.imbalance_factor, found.num_images) == ((40, 20, 9, 5), 8.0, 20)
    assert found.class_names == ("class-0", "class-1", "class-2", "class-3")
    assert [point.epoch for point in found.epochs] == [1, 2]
    assert [point.epoch for point in found.steps] == [0.4, 0.8, 1.4, 1.8]  # 74 images, 16 a step: five steps, a line every two
    assert set(found.loss_floors) == {"uniform"}
    assert steps == [("ours", 1, 2), ("ours", 2, 2)]
    assert opened == [shards.root]
    assert {note.section for note in found.notes} <= {"settings"}


def test_the_pass_finds_what_the_run_reported(trained: Path, shards: ShardSet) -> None:
    found, summary = only(read_findings([trained], ON_CPU)), summary_of(trained)
    measured = found.measured
    assert measured is not None
    assert measured.accuracy is not None
    assert measured.geometry is not None
    assert (measured.checkpoint, measured.split) == ("last epoch (2)", "test")
    assert json.loads(json.dumps(measured.accuracy.to_dict())) == summary["last_epoch_no_tta"]
    assert found.calibration == measured.accuracy.calibration
    assert json.loads(json.dumps(found.features)) == summary["last_epoch_features"]
    assert len(measured.geometry.compactness_K) == 4
    assert measured.histogram is not None
    assert measured.histogram.num_pairs == 6
    assert measured.cosine_map is not None
    assert measured.cosine_map.cell_classes == ((0,), (1,), (2,), (3,))
    assert measured.took_s > 0


def test_confusions_are_those_of_the_network(trained: Path, shards: ShardSet) -> None:
    """Counted once more, image by image."""
    network = open_network(trained, device="cpu")
    loader = build_loader(shards, "test", network.config.data, seed=0, device=torch.device("cpu"), training=False)
    mean, std = channel_statistics(network.config.data.augment, torch.device("cpu"))
    mistakes: Counter[tuple[int, int]] = Counter()
    with torch.inference_mode():
        for batch in loader.epoch(0):
            for image_HWC, label in zip(batch.images_SHWC, batch.labels_S.tolist(), strict=True):
                predicted = int(network.model(normalise(image_HWC[None], mean, std, torch.float32)).argmax())
                mistakes[label, predicted] += predicted != label
    loader.close()
    measured = measure(trained, shards=shards, device="cpu")
    assert measured.confused
    assert {(pair.true_class, pair.predicted_class): pair.count for pair in measured.confused} == +mistakes
    for pair in measured.confused:
        assert pair.share == pair.count / 5
        assert len(pair.mistaken) == min(3, pair.count)
        assert pair.example is not None
        assert pair.example.alt == f"a training image of class-{pair.predicted_class}"


def test_a_device_without_room_for_the_features_counts_no_mistake_twice(
    trained: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room = measure(trained, shards=shards, device="cpu")
    add, batches = FeatureStatistics.add, iter(range(9))

    def full_at_the_second_batch(*arguments: Any) -> None:
        if next(batches):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        add(*arguments)

    monkeypatch.setattr(FeatureStatistics, "add", full_at_the_second_batch)
    notes: list[Note] = []
    without = measure(trained, shards=shards, device="cpu", say=notes.append)
    assert without.geometry is None
    assert (without.accuracy, without.confused) == (with_room.accuracy, with_room.confused)
    assert [note.section for note in notes] == ["features"]


def test_without_the_model_the_record_is_shown(trained: Path) -> None:
    found = only(read_findings([trained], READ_ONLY))
    assert found.measured is None
    assert found.class_counts_K == (40, 20, 9, 5)
    assert found.calibration is not None
    assert sum(found.calibration.bin_counts) == 20
    assert found.features is not None
    assert found.features["compactness"]["many"]["mean"] is None
    for section in ("classifier", "confusions"):
        assert notes_of(found, section) == ["Not measured: it was asked for without the model."]


@pytest.mark.parametrize("model", [True, False])
def test_deleted_shards_leave_the_classifier_and_the_names(run: Path, tmp_path: Path, model: bool) -> None:
    gone = str(tmp_path / "gone")
    edit(run / ENVIRONMENT_FILE, lambda recorded: recorded.update(shards=gone))
    found = only(read_findings([run], Asked(model=model, device="cpu")))
    assert found.class_names == ("class-0", "class-1", "class-2", "class-3")
    assert len(found.per_class_K) == 4
    assert (found.measured is not None) == model
    if found.measured is not None:
        assert (found.measured.split, found.measured.accuracy, found.measured.confused) == ("", None, ())
        assert found.measured.histogram is not None
        (sentence,) = notes_of(found, "confusions")
        assert gone in sentence
        assert "--shards" in sentence


def test_neither_shards_nor_checkpoint(run: Path, tmp_path: Path) -> None:
    edit(run / ENVIRONMENT_FILE, lambda recorded: recorded.update(shards=str(tmp_path / "gone")))
    shutil.rmtree(run / "checkpoints")
    found = only(read_findings([run], ON_CPU))
    assert (found.class_names, found.class_counts_K, found.imbalance_factor, found.measured) == ((), (), None, None)
    assert len(found.per_class_K) == 4  # the summary has them
    assert {"classes", "classifier", "confusions"} <= {note.section for note in found.notes}
    assert "no checkpoint" in notes_of(found, "classifier")[0]


def test_other_shards_are_not_measured_with(run: Path, make_shards: MakeShards, trained: Path) -> None:
    other = make_shards(train=(30, 20, 9, 5))
    found = only(read_findings([run], Asked(device="cpu", shards=str(other.root))))
    assert found.class_counts_K == (40, 20, 9, 5)
    assert found.measured is not None
    assert found.measured.accuracy is None
    assert str(other.root) in notes_of(found, "confusions")[0]
    with pytest.raises(ConfigError, match="other 'cifar10-lt' shards"):
        measure(run, shards=other, device="cpu")
    with pytest.raises(ShardError, match="no shards at"):
        read_findings([trained], Asked(shards=str(run / "nowhere")))
    edit(run / ENVIRONMENT_FILE, lambda recorded: recorded.pop("fingerprint"))
    unknown = only(read_findings([run], Asked(model=True, device="cpu", shards=str(other.root))))
    assert "died before it recorded which shards" in notes_of(unknown, "confusions")[0]


def test_a_run_that_was_stopped_shows_its_newest_checkpoint(shards: ShardSet, tmp_path: Path) -> None:
    train(SMALL, shards, tmp_path / "stopped", stop_at=lambda trainer: trainer.state.cursor.global_step == 7)
    found = only(read_findings([tmp_path / "stopped"], ON_CPU))
    assert (found.complete, found.headline, found.split) == (False, MEASURED, "test")
    assert found.measured is not None
    assert found.measured.accuracy is not None
    assert found.measured.checkpoint == "last checkpoint (step 2 of epoch 2)"
    assert found.measurements == {MEASURED: found.measured.accuracy.headline()}
    assert found.per_class_K == found.measured.accuracy.per_class
    (sentence,) = notes_of(found, "headline")
    assert "1 of 2 epochs done: stopped " in sentence
    assert "its last checkpoint (step 2 of epoch 2)" in sentence
    only_read = only(read_findings([tmp_path / "stopped"], READ_ONLY))
    assert (only_read.headline, only_read.measurements, only_read.per_class_K) == ("", {}, ())


def test_a_run_that_broke_says_where(run: Path) -> None:
    without_summary(run)
    with (run / METRICS_FILE).open("a") as file:
        file.write(json.dumps({"kind": "broken", "epoch": 1, "step": 4, "ids": [1]}) + "\n" + '{"kind": "ste')
    (sentence,) = notes_of(only(read_findings([run], READ_ONLY)), "headline")
    assert "not finite from step 5 of epoch 2 on" in sentence


def test_an_older_summary_is_shown_as_far_as_it_goes(run: Path) -> None:
    def as_it_was(summary: dict[str, Any]) -> None:
        for name in ("headline", "selected_by", "last_epoch_features"):
            del summary[name]
        for label in ("last_epoch_no_tta", "last_epoch_flip_tta", "best_on_test_no_tta"):
            summary[label].pop("calibration", None)
            del summary[label]["ece"]

    edit_summary(run, as_it_was)
    read = only(read_findings([run], READ_ONLY))
    assert (read.headline, read.selected_by, read.calibration, read.features) == ("last_epoch_no_tta", None, None, None)
    assert read.measurements["last_epoch_no_tta"]["ece"] is None
    assert {"calibration", "features"} <= {note.section for note in read.notes}
    measured = only(read_findings([run], ON_CPU))
    assert measured.calibration is not None
    assert measured.features is not None
    assert {note.section for note in measured.notes} <= {"settings"}


def test_figures_that_differ_from_the_summary_are_pointed_out(run: Path) -> None:
    edit_summary(run, lambda summary: summary["last_epoch_no_tta"].update(all=99.0))
    (sentence,) = notes_of(only(read_findings([run], ON_CPU)), "headline")
    assert "99.00 %" in sentence


def test_a_stage_two(run: Path, shards: ShardSet) -> None:
    folder = run / "stage2-crt"
    retrain(run, shards, folder, RetrainConfig(method="crt", epochs=2))
    found = read_findings([run, folder], ON_CPU).runs[1]
    assert (found.name, found.stage, found.retrained_with) == ("ours/stage2-crt", 2, "crt")
    assert found.title == "BCE3S, resnet8-cifar, cifar10-lt, stage two (crt)"
    assert found.measured is not None
    assert found.measured.accuracy is not None
    assert found.measured.accuracy.headline() == found.measurements[found.headline]
    assert found.calibration is not None
    assert found.calibration.confidence == "softmax"  # of what retrained it: stage one is BCE
    assert "retrain-classifier" in found.command


def test_two_classes(make_shards: MakeShards, tmp_path: Path) -> None:
    shards = make_shards(train=(24, 6), test=3)
    train(replace(SMALL, epochs=1), shards, tmp_path / "two")
    measured = only(read_findings([tmp_path / "two"], ON_CPU)).measured
    assert measured is not None
    assert measured.histogram is not None
    assert (measured.histogram.num_pairs, measured.histogram.simplex) == (1, -1.0)


def test_a_seeds_folder_is_its_runs_and_their_mean(trained: Path, tmp_path: Path) -> None:
    for seed, accuracy in ((10, 50.0), (2, 60.0), (0, 0.0)):
        run = Path(shutil.copytree(trained, tmp_path / "both" / f"s{seed}"))
        edit_summary(run, lambda summary, accuracy=accuracy: summary["last_epoch_no_tta"].update(all=accuracy))  # type: ignore[misc]
    without_summary(tmp_path / "both" / "s0")
    found = read_findings([tmp_path / "both", trained], READ_ONLY)
    assert [each.name for each in found.runs] == ["s0", "s2", "s10", "ours"]
    (seeds,) = found.seeds
    assert seeds.runs == ("s0", "s2", "s10")
    assert seeds.figures["figures"]["last_epoch_no_tta"]["all"] == {"mean": 55.0, "sd": pytest.approx(7.0711, abs=1e-4)}
    assert seeds.sentence.startswith("all 55.00 ± 7.07, many n/a, ")
    assert seeds.sentence.endswith("n = 2 seeds, top-1 accuracy in % (1 of 3 runs have not ended).")


def test_names_tell_runs_apart(trained: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(trained, tmp_path / where)) for where in ("a/x", "b/x", "c/y")]
    assert [each.name for each in read_findings(folders, READ_ONLY).runs] == ["a/x", "b/x", "y"]


def test_a_place_without_a_run_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "seeds.json").write_text("{}")
    for place, said in (
        (tmp_path / "none", "does not exist; name a folder"),
        (tmp_path / "file", "is a file, not a run folder"),
        (tmp_path / "seeds", "holds seeds.json but no run"),
        (trained.parent, f"name those, as in 'bce3s report {trained}'"),
        (trained / "checkpoints", "is not a run folder: it has no config.json"),
    ):
        with pytest.raises(UserError) as raised:
            read_findings([place])
        assert said in str(raised.value)
        assert str(place) in str(raised.value)


def test_a_device_that_is_not_there_ends_it_at_once(trained: Path) -> None:
    with pytest.raises(BackendError, match="unknown device"):
        read_findings([trained], Asked(device="abacus"))


def test_a_checkpoint_that_was_asked_for_and_is_gone(run: Path, shards: ShardSet) -> None:
    (run / "best.safetensors").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        measure(run, shards=shards, checkpoint="best", device="cpu")
    found = only(read_findings([run], Asked(checkpoint="best", device="cpu")))
    assert found.measured is None
    assert found.class_names  # of the shards
    assert Note(section="classifier", sentence=notes_of(found, "classifier")[0]) in found.notes


def test_the_command_that_was_not_recorded_has_the_same_settings(run: Path) -> None:
    edit(run / ENVIRONMENT_FILE, lambda recorded: recorded.pop("command", None))
    command = shlex.split(only(read_findings([run], READ_ONLY)).command)
    assert command[:2] == ["bce3s", "fast-train"]
    printed = CliRunner().invoke(app, [*command[1:], "--print-config"])
    assert printed.exit_code == 0, printed.output
    assert json.loads(printed.stdout) == json.loads((run / CONFIG_FILE).read_text())


def test_settings_of_an_older_config_are_not_made_up(run: Path) -> None:
    """It does not name the kind of classifier, which is the method's own."""
    edit(run / ENVIRONMENT_FILE, lambda recorded: recorded.pop("command", None))
    edit(run / CONFIG_FILE, lambda config: [config["model"].pop(name) for name in ("classifier", "classifier_scale", "bias_prior")])
    command = only(read_findings([run], READ_ONLY)).command
    assert "model.classifier" not in command
    assert "--set data.image_size=16" in command


def test_the_recorded_command_is_shown_and_one_of_another_version_is_not_made_up(run: Path) -> None:
    edit(run / ENVIRONMENT_FILE, lambda recorded: recorded.update(command="bce3s fast-train --dataset demo"))
    found = only(read_findings([run], READ_ONLY))
    assert (found.command, notes_of(found, "settings")) == ("bce3s fast-train --dataset demo", [])
    edit(run / ENVIRONMENT_FILE, lambda recorded: recorded.pop("command"))
    edit(run / CONFIG_FILE, lambda config: config["loss"].update(of_tomorrow=1))
    found = only(read_findings([run], READ_ONLY))
    assert (found.command, found.method) == ("", "bce3s")
    assert "another version" in notes_of(found, "settings")[0]
