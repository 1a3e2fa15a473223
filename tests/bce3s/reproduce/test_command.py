"""`bce3s reproduce` for real, on tiny shards: a table, killed and continued, and the sentences of what cannot be."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bce3s.reproduce import train as training
from bce3s.reproduce.collect import collect
from bce3s.reproduce.runs import plan_run
from bce3s.reproduce.tables import build_table
from bce3s.runlog import read_metrics
from bce3s.seeds import is_finished, summary_of
from tests.bce3s.reproduce.tiny import tiny_shards
from tests.bce3s.train.runs import wait_until
from tests.commands import begin, finish, run

SMALL = ("--budget", "small", "--device", "cpu")
ONE_EPOCH = ("--set", "epochs=1")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("tiny"))


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "ablation-cifar100.json").read_text())
    return record


def row_of(out: Path, name: str) -> dict[str, Any]:
    return next(row for row in record_of(out)["rows"] if row["name"] == name)


def test_a_table_is_made_and_grows(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["reproduce", "ablation-cifar100", *SMALL, *ONE_EPOCH, "--shards", str(shards), "--out", str(out)]
    first = run(*command, "--rows", "ce,bce", "--seeds", "0", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "run 1 of 2: ce-s0" in first.stdout
    said = summary_of(out / "runs" / "ce-s0")["last_epoch_no_tta"]
    row = row_of(out, "ce")
    assert (row["n"], row["missing_seeds"]) == (1, [])
    assert row["figures"]["last_epoch_no_tta"]["few"] == {"mean": said["few"], "sd": None}
    assert row["by_seed"]["0"]["last_epoch_no_tta"]["all"] == said["all"]
    assert row["published"]["all"] == 51.48
    # Evaluated at the end alone, so the best epoch is the last one by name only, and no figure beside it.
    assert "best_on_test_no_tta" in summary_of(out / "runs" / "ce-s0")
    assert "best_on_test_no_tta" not in row["figures"]
    assert row["cost"]["wall_s"] > row["cost"]["train_s"] > 0
    assert row_of(out, "bce3s")["n"] == 0
    page = (out / "ablation-cifar100.md").read_text()
    assert f"| CE joint | {said['all']:.2f} | {said['many']:.2f} |" in page
    assert "| BCE3S | – | – | – | – | 0 of 1 | 55.99 | 83.34 | 57.09 | 22.80 | [1] |" in page
    assert "BCE joint above CE joint (all): not decided at n = 1" in page
    assert "Other than the budget's, for all rows: epochs=1." in page
    # Another row, beside the ones there are, with nothing trained twice; the JSON alone goes to standard output.
    before = (out / "runs" / "ce-s0" / "metrics.jsonl").read_bytes()
    second = run(*command, "--rows", "ce,uniform", "--seeds", "0", "--json", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    printed = json.loads(second.stdout)
    assert printed == record_of(out)
    assert {row["name"]: row["n"] for row in printed["rows"]}.items() >= {"ce": 1, "bce": 1, "uniform": 1, "bce3s": 0}.items()
    assert (out / "runs" / "ce-s0" / "metrics.jsonl").read_bytes() == before
    # Runs of other settings are not mixed into the table, and not trained over.
    longer = build_table("ablation-cifar100", "small", ["epochs=2"])
    assert [row["n"] for row in collect(longer, out, {}, (0,), "auto", ())["rows"]] == [0] * 6
    other = run(*command[:-2], "--out", str(out), "--rows", "ce", "--seeds", "0", "--set", "log_every=3", "--set", "epochs=2", cwd=tmp_path)
    assert other.returncode == 2
    assert other.stderr == (f"error: {out}/runs/ce-s0 was trained with epochs=1, this command says 2; use the same, or another --out\n")


def test_killed_in_the_middle_the_same_command_goes_on(shards: Path, tmp_path: Path) -> None:
    out, output = tmp_path / "out", tmp_path / "said.txt"
    command = [
        *("reproduce", "ablation-cifar100", *SMALL, "--set", "epochs=12", "--shards", str(shards), "--out", str(out)),
        *("--rows", "ce,bce", "--seeds", "0"),
    ]
    process = begin(command, output)
    going = out / "runs" / "bce-s0"
    wait_until(lambda: len([line for line in read_metrics(going) if line["kind"] == "epoch"]) >= 2)
    process.kill()
    assert finish(process) == -signal.SIGKILL
    assert (row_of(out, "ce")["n"], row_of(out, "bce")["n"]) == (1, 0)
    assert not is_finished(going)
    noted = json.loads((going / "reproduce.json").read_text())
    (going / "reproduce.json").write_text(json.dumps({**noted, "commits": ["earlier"]}))
    before = (out / "runs" / "ce-s0" / "metrics.jsonl").read_bytes()
    assert finish(begin(command, output)) == 0, output.read_text()
    assert "2 runs, 1 finished before" in output.read_text()
    assert "continuing after" in output.read_text()
    assert (out / "runs" / "ce-s0" / "metrics.jsonl").read_bytes() == before
    assert [line["epoch"] for line in read_metrics(going) if line["kind"] == "epoch"] == list(range(12))
    assert json.loads((going / "reproduce.json").read_text())["commits"] == ["earlier", *noted["commits"]]
    assert row_of(out, "bce")["cost"]["wall_s"] is None  # it was stopped: nobody can say how long it would have taken
    assert row_of(out, "ce")["cost"]["wall_s"] > 0


def test_asked_to_stop_it_says_how_to_go_on(shards: Path, tmp_path: Path) -> None:
    out, output = tmp_path / "out", tmp_path / "said.txt"
    command = ["reproduce", "ablation-cifar100", *SMALL, "--set", "epochs=200", "--shards", str(shards), "--out", str(out), "--seeds", "0"]
    process = begin(command, output)
    wait_until(lambda: len(read_metrics(out / "runs" / "ce-s0")) >= 2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 0, output.read_text()
    assert "6 of 6 runs are not finished, the same command goes on" in output.read_text()
    assert row_of(out, "ce")["n"] == 0


def sentence(*arguments: str, cwd: Path) -> str:
    """Of a command that must be refused before it trains."""
    found = run("reproduce", *arguments, cwd=cwd)
    assert found.returncode == 2, found.stdout + found.stderr
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1, found.stderr
    return found.stderr


def test_what_cannot_be_is_said_in_one_sentence(shards: Path, tmp_path: Path) -> None:
    table = ("ablation-cifar100", *SMALL)
    assert "name a table: ablation-cifar100, cifar-main" in sentence(cwd=tmp_path)
    assert "unknown row of ablation-cifar100 'x'; known: ce, bce" in sentence(*table, "--rows", "x", cwd=tmp_path)
    assert "name the folder of the unpacked CIFAR archives with --source" in sentence(*table, cwd=tmp_path)
    assert "there is no folder nowhere" in sentence(*table, "--source", "nowhere", cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "unpack cifar-100-python.tar.gz there" in sentence(*table, "--source", "empty", cwd=tmp_path)
    assert "give one of them" in sentence(*table, "--source", "empty", "--shards", str(shards), cwd=tmp_path)
    full = sentence("ablation-cifar100", "--shards", str(shards / "cifar100-lt-if100-20classes"), cwd=tmp_path)
    assert "the table needs shards of cifar100-lt-if100, but" in full
    assert "has classes 20; leave out --shards and give --source" in full
    assert "--jobs must be at least 1, not 0" in sentence(*table, "--jobs", "0", cwd=tmp_path)
    assert "unknown setting 'no.such'" in sentence(*table, "--shards", str(shards), "--set", "no.such=1", cwd=tmp_path)
    assert not list(tmp_path.glob("**/*.json"))


def test_shards_are_made_from_the_source_once(tmp_path: Path) -> None:
    """A CIFAR-100 of 20 classes, made up; nothing is trained, because the learning rate is refused."""
    folder = tmp_path / "source" / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", 500), ("test", 2)):
        labels = np.repeat(np.arange(20), count).tolist()
        pixels = np.zeros((len(labels), 3072), np.uint8)
        pixels[:, :4] = np.arange(len(labels))[:, None] % 251
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"fine_labels": labels}, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [f"c{k}".encode() for k in range(20)]}, protocol=2))
    command = ("ablation-cifar100", *SMALL, "--set", "optimizer.learning_rate=-1", "--out", "out", "--rows", "ce")
    assert "learning_rate must be positive" in sentence(*command, "--source", "source", cwd=tmp_path)
    manifest = tmp_path / "out" / "shards" / "cifar100-lt-if100-20classes" / "manifest.json"
    assert json.loads(manifest.read_text())["splits"]["train"]["num_samples"] == 2295
    before = manifest.stat().st_mtime_ns
    assert "learning_rate must be positive" in sentence(*command, cwd=tmp_path)  # needs no source any more
    assert manifest.stat().st_mtime_ns == before


def test_listings(tmp_path: Path) -> None:
    tables = run("reproduce", "--list", cwd=tmp_path)
    assert tables.returncode == 0
    assert all(name in tables.stdout for name in ("ablation-cifar100", "cifar-main", "methods-cifar100", "beyond-cifar100"))
    rows = run("reproduce", "cifar-main", "--list", cwd=tmp_path)
    assert "bce3s-c100-if50" in rows.stdout
    assert "only published" in rows.stdout
    assert "65.23" in rows.stdout


@pytest.mark.slow
def test_runs_beside_each_other_stop_with_the_command_that_was_killed(shards: Path, tmp_path: Path) -> None:
    out, output = tmp_path / "out", tmp_path / "said.txt"
    arguments = ["reproduce", "beyond-cifar100", *SMALL, "--shards", str(shards), "--out", str(out), "--seeds", "0,1", "--jobs", "2"]
    process = begin([*arguments, "--rows", "stage-two", "--set", "epochs=400"], output)
    logs = [out / "runs" / f"bce3s-s{seed}" for seed in (0, 1)]
    wait_until(lambda: all(read_metrics(log) for log in logs), timeout_s=120)
    process.kill()
    finish(process)
    wait_until(lambda: all("stopped by SIGTERM" in (out / "runs" / f"bce3s-s{seed}.log").read_text() for seed in (0, 1)), timeout_s=30)
    sizes = [len(read_metrics(log)) for log in logs]
    process = begin([*arguments, "--rows", "stage-two", "--set", "epochs=400"], output)
    wait_until(lambda: all(len(read_metrics(log)) > size for log, size in zip(logs, sizes, strict=True)), timeout_s=120)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 0, output.read_text()
    assert "2 of 2 runs are not finished, the same command goes on" in output.read_text()


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_done(shards: Path, tmp_path: Path) -> None:
    out, output = tmp_path / "out", tmp_path / "said.txt"
    arguments = ["reproduce", "beyond-cifar100", *SMALL, *ONE_EPOCH, "--shards", str(shards), "--out", str(out), "--seeds", "0"]
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "area-s0").write_text("a file where a folder should be")
    assert finish(begin([*arguments, "--rows", "area,stage-two", "--jobs", "2"], output)) == 2
    said = output.read_text()
    assert "error: area-s0: " in said
    assert "1 of 2 runs are not finished" in said
    record = json.loads((out / "beyond-cifar100.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert (rows["area"]["n"], rows["bce3s"]["n"], rows["stage-two"]["n"]) == (0, 1, 1)
    assert rows["stage-two"]["headline"] == "stage2:last_epoch_no_tta"
    assert (
        rows["stage-two"]["figures"]["stage2:last_epoch_no_tta"]["all"]["mean"]
        == (summary_of(out / "runs" / "bce3s-s0" / "stage2-bce")["last_epoch_no_tta"]["all"])
    )
    assert (
        rows["average"]["figures"]["last_epoch_average_no_tta"]["all"]["mean"]
        == (summary_of(out / "runs" / "bce3s-s0")["last_epoch_average_no_tta"]["all"])
    )


def test_a_run_that_another_process_trains_is_left_alone(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = build_table("ablation-cifar100", "small")
    planned = plan_run(table.budget, table.row("ce"), 0, {"cifar100-lt-if100-20classes": shards}, tmp_path)
    monkeypatch.setattr(training, "_LOCK_PATIENCE_S", 0.1)
    planned.out.parent.mkdir()
    with (planned.out.parent / "ce-s0.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(training.RunFailedError, match=r"another process trains .*ce-s0; wait for it or end it"):
            training.train(planned)
    assert not planned.out.exists()
