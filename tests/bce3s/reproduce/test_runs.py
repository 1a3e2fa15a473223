"""A stage two that somebody made otherwise is not the table's: not counted, not trained over, and named with the way out."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bce3s.cli import app
from bce3s.reproduce.figures import figures_of
from bce3s.reproduce.runs import Run, is_of_table, plan_run
from bce3s.reproduce.session import _require_continuable
from bce3s.reproduce.tables import build_table
from bce3s.reproduce.train import train
from pipelines.format import open_shards
from pipelines.types import ConfigError
from tests.bce3s.reproduce.tiny import tiny_shards

NAME = "cifar100-lt-if100-20classes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a table with one run of both stages, finished; the tests leave it as it was."""
    folder = tiny_shards(tmp_path_factory.mktemp("tiny"))
    train(planned(folder))
    return folder


def planned(folder: Path, *settings: str) -> Run:
    table = build_table("beyond-cifar100", "small", ["epochs=2", "eval_every=1", "retrain.epochs=2", *settings])
    return plan_run(table.budget, table.row("stage-two"), 0, {NAME: folder / NAME}, folder)


def refused(run: Run) -> str:
    assert not is_of_table(run)
    with pytest.raises(ConfigError) as raised:
        _require_continuable(run, open_shards(run.shards))
    return str(raised.value)


def retrain(*arguments: str) -> None:
    found = CliRunner().invoke(app, ["retrain-classifier", *arguments])
    assert found.exit_code == 0, found.output


def test_what_the_table_made_is_counted_with_its_best_epochs(folder: Path) -> None:
    run = planned(folder)
    assert is_of_table(run)
    _require_continuable(run, open_shards(run.shards))
    assert {"best_on_test_no_tta", "stage2:best_on_test_no_tta"} <= figures_of(run).keys()  # of several evaluations


def test_other_settings_of_stage_two_are_refused_with_the_command_that_makes_it_anew(folder: Path) -> None:
    other = planned(folder, "retrain.epochs=1", "retrain.batch_size=16")
    said = refused(other)
    assert "stage2-bce was made with retrain.epochs=2, this command says 1; use the same, or make it anew with: bce3s" in said
    for run, wanted in ((other, said), (planned(folder), "")):
        wanted = wanted or refused(run)
        retrain(*shlex.split(wanted.partition("anew with: ")[2])[2:])
        assert is_of_table(run)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--seed", "7"), "was made with seed=7, this command says 0"),
        (("--checkpoint", "best"), "was made from the best checkpoint, this command takes the last one"),
    ],
)
def test_another_seed_or_checkpoint_is_refused_too(folder: Path, arguments: tuple[str, ...], sentence: str) -> None:
    run = planned(folder)
    retrain(str(run.out), *arguments, "--overwrite")
    said = refused(run)
    assert sentence in said
    retrain(*shlex.split(said.partition("anew with: ")[2])[2:])
    assert is_of_table(run)


def test_a_stage_two_of_other_weights_is_not_counted(folder: Path) -> None:
    run = planned(folder)
    path = run.stage_two / "environment.json"
    before = path.read_text()
    record = json.loads(before)
    path.write_text(json.dumps({**record, "stage_one": {**record["stage_one"], "crc32": "00000000"}}))
    assert re.search(r"stage2-bce came of other weights than .*bce3s-s0 has now; make it anew with: bce3s retrain-cl", refused(run))
    path.write_text(before)
    assert is_of_table(run)
