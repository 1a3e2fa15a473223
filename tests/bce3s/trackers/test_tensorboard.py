"""What TensorBoard itself reads of a run's event files."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from bce3s.runlog import read_metrics
from bce3s.trackers import follow_finished, followed
from tests.bce3s.progress.logs import SUMMARY, lines_until, step_line, write_run
from tests.commands import finish_together, run

pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """By tag, value by step, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found: dict[str, dict[int, float]] = {}
    for tag in read.Tags()["scalars"]:
        events = read.Scalars(tag)
        found[tag] = {event.step: event.value for event in events}
        assert len(found[tag]) == len(events), f"{tag} has a step twice"
    return found


def feed(folder: Path, steps_done: int, lines: list[dict[str, Any]]) -> list[str]:
    said: list[str] = []
    with followed("tensorboard", folder, steps_done, said.append) as feeds:
        for line in lines:
            feeds[0](line)
    return said


def test_every_line_is_there_by_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path, lines := [*lines_until(2, -1), SUMMARY])
    follow_finished("tensorboard", folder, pytest.fail)
    found = scalars(folder)
    assert list(found["loss/total"]) == [20, 40, 60, 80, 100, 120, 140, 160, 180, 200]
    assert found["loss/total"][120] == pytest.approx(next(line["total"] for line in lines if line["kind"] == "step" and line["epoch"] == 1))
    assert found["epoch"][150 - 10] == pytest.approx(1.4)
    assert found["val/all"] == {200: pytest.approx(41.0)}
    assert list(found["epoch rate/train_s"]) == [100, 200]
    assert found["result/all"][0] == pytest.approx(54.7)
    assert "val/few" not in found  # nothing is not 0
    assert not any("class_subset_size" in tag for tag in found)


def test_a_continuation_takes_the_place_of_what_a_killed_run_had_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [])
    assert feed(folder, 0, [step_line(0, step, total=1.0) for step in range(99)]) == []
    assert feed(folder, 50, [step_line(0, step, total=2.0) for step in range(50, 80)]) == []
    assert scalars(folder)["loss/total"] == {step + 1: 1.0 if step < 50 else 2.0 for step in range(80)}


def test_a_run_that_starts_anew_forgets_the_one_before(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [])
    for total in (1.0, 2.0):
        feed(folder, 0, [step_line(0, 19, total=total)])
    assert scalars(folder)["loss/total"] == {20: 2.0}


def test_a_whole_run_and_its_stage_two_are_tracked_each_in_its_folder(make_shards: Any, tmp_path: Path) -> None:
    shards = make_shards(train=(14, 7, 3), size=(16, 16), test=2)
    arguments = ["fast-train", "--dataset", "cifar10-lt", "--shards", str(shards.root), "--recipe", "cifar10lt_resnet20_40ep"]
    arguments += ["--epochs", "2", "--precision", "fp32", "--device", "cpu", "--loader", "resident", "--batch-size", "8", "--out", "run"]
    arguments += [f"--set={setting}" for setting in ("data.image_size=16", "data.num_threads=1", "log_every=1", "retrain.epochs=2")]
    found = run(*arguments, "--stages", "2", "--log", "tensorboard", "--quiet", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    for folder in (tmp_path / "run", tmp_path / "run" / "stage2-bce"):
        lines = [line for line in read_metrics(folder) if line["kind"] == "epoch"]
        assert list(scalars(folder)["epoch loss/total"].values()) == pytest.approx([line["total"] for line in lines], rel=1e-6)
    assert len(scalars(tmp_path / "run")["loss/total"]) == 6


def without_room(folder: Path) -> None:
    """A disk that takes no more than 20 kB; what is left of the test says how it went by this process's exit status."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    import time

    said: list[str] = []
    with followed("tensorboard", folder, 0, said.append) as feeds:
        deadline_s = time.monotonic() + 20
        while not said and time.monotonic() < deadline_s:
            feeds[0](step_line(0, 19))
        feeds[0](step_line(0, 39))
    (folder / "said.txt").write_text("\n".join(said))


def test_a_disk_that_is_full_ends_the_tracking_and_nothing_else(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [])
    assert finish_together(without_room, [(folder,)]) == [0]
    assert (folder / "said.txt").read_text() == (
        "NOT TRACKED: --log tensorboard failed ([Errno 27] File too large) and is off from here on; metrics.jsonl has every line"
    )
