"""The tables as data: every row can be trained, claims speak of rows that are, published figures are those of the sources."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from bce3s.losses import LOSSES
from bce3s.reproduce.grid import BUDGETS
from bce3s.reproduce.runs import plan_runs
from bce3s.reproduce.tables import TABLES, build_table, select_rows
from pipelines.types import ConfigError

EVERY_TABLE = list(itertools.product(TABLES, BUDGETS))


@pytest.mark.parametrize(("name", "budget"), EVERY_TABLE)
def test_every_row_has_settings_that_a_run_can_have(name: str, budget: str) -> None:
    table = build_table(name, budget)
    assert table.name == name
    names = [row.name for row in table.rows]
    assert len(set(names)) == len(names)
    runs = plan_runs(table, select_rows(table, None), (0, 1), {}, Path("out"))
    assert len({run.out for run in runs}) == len(runs)
    assert {run.config.seed for run in runs} == {0, 1}
    assert [run.config.seed for run in runs] == sorted(run.config.seed for run in runs)  # a whole table of one seed comes first
    for row in table.rows:
        assert row.shards is not None or row.published is not None
        assert row.shards is None or row.shards.dataset == next(run for run in runs if run.name == f"{row.run_name}-s0").config.dataset


@pytest.mark.parametrize(("name", "budget"), EVERY_TABLE)
def test_claims_are_about_trained_rows(name: str, budget: str) -> None:
    table = build_table(name, budget)
    assert table.claims
    assert all(table.row(row).shards is not None for claim in table.claims for row in (claim.better, claim.worse))


def test_every_row_of_one_table_differs_in_what_it_says_alone() -> None:
    table = build_table("ablation-cifar100", "full")
    runs = plan_runs(table, table.rows, (0,), {}, Path("out"))
    assert {run.config.model.arch for run in runs} == {"resnet34-small-stem"}
    assert {(run.config.epochs, run.config.data, run.config.optimizer) for run in runs} == {
        (320, runs[0].config.data, runs[0].config.optimizer)
    }
    terms = {run.name: (run.config.loss.name, run.config.loss.joint, run.config.loss.contrastive, run.config.loss.uniform) for run in runs}
    assert terms["ce-tsl-s0"] == ("tsl", "ce", "ce", "ce")
    assert terms["contrastive-s0"] == ("tsl", "bce", "bce", "off")
    assert terms["uniform-s0"] == ("tsl", "bce", "off", "bce")


def test_published_differences_are_those_of_the_paper() -> None:
    table = build_table("ablation-cifar100", "small")
    said = {(claim.better, claim.worse, claim.group): table.published_difference(claim) for claim in table.claims}
    assert said["bce", "ce", "all"] == pytest.approx(1.40)
    assert said["bce3s", "ce", "few"] == pytest.approx(7.13)
    main = build_table("cifar-main", "full")
    published = {row.name: row.published.all for row in main.rows if row.published is not None}
    assert [published[f"both-stages-c100-if{factor}"] for factor in (100, 50, 10)] == [59.50, 65.23, 76.13]
    assert [published[f"glmc-max-norm-c100-if{factor}"] for factor in (100, 50, 10)] == [58.41, 64.57, 74.28]
    assert (published["both-stages-c10-if100"], published["glmc-max-norm-c10-if100"]) == (90.08, 89.58)


def test_figures_that_were_measured_otherwise_have_no_published_difference() -> None:
    beyond, methods, main = (build_table(name, "full") for name in ("beyond-cifar100", "methods-cifar100", "cifar-main"))
    stages = next(claim for claim in beyond.claims if claim.better == "stage-two")
    assert all(beyond.row(name).published is not None for name in (stages.better, stages.worse))
    assert beyond.published_difference(stages) is None  # of another stage one (traps.md A10)
    assert "another stage one" in str(beyond.row("stage-two").published)
    said = {claim.worse: methods.published_difference(claim) for claim in methods.claims}
    assert said["ce"] == pytest.approx(4.51)
    assert said["glmc"] is None
    assert all(main.published_difference(claim) is None for claim in main.claims)


def test_a_source_has_one_label_in_every_table() -> None:
    methods, main = build_table("methods-cifar100", "full"), build_table("cifar-main", "full")
    for name in ("glmc", "proco"):
        theirs, ours = methods.row(name).published, main.row(f"{name}-c100-if100").published
        assert theirs == ours
        assert "another subset" in str(ours)
    labels = {row.published.label for row in build_table("ablation-cifar100", "full").rows if row.published is not None}
    assert labels == {"paper, second-hand; stage one; flip TTA and best on test as far as the authors' log shows"}


def test_the_main_table_judges_stage_one_against_stage_one() -> None:
    table = build_table("cifar-main", "full")
    for claim in table.claims:
        better, worse = table.row(claim.better), table.row(claim.worse)
        assert better.stages == worse.stages or better.runs == worse.name
    runs = plan_runs(table, select_rows(table, None), (0,), {}, Path("out"))
    assert len(runs) == 3 * 6  # both stages take no training of their own
    assert {run.name for run in runs if run.stages == 2} == {row.name + "-s0" for row in table.rows if row.name.startswith("bce3s-")}


def test_all_methods_have_a_row() -> None:
    rows = {row.name for row in select_rows(build_table("methods-cifar100", "full"), None)}
    assert rows == set(LOSSES) - {"tsl"}


def test_one_change_each() -> None:
    table = build_table("beyond-cifar100", "full")
    runs = {run.name: run for run in plan_runs(table, select_rows(table, None), (0,), {}, Path("out"))}
    assert runs["bce3s-s0"].stages == 2  # the rows of the average and of stage two are measured on these runs
    assert "average-s0" not in runs
    assert "stage-two-s0" not in runs
    assert runs["warm-up-s0"].config.loss.contrastive_warmup_epochs == 32
    larger = runs["batch-256-s0"].config
    assert (larger.data.batch_size, larger.optimizer.learning_rate, larger.optimizer.warmup_epochs) == (256, 0.04, 5.0)
    alone = plan_runs(table, select_rows(table, "average"), (0,), {}, Path("out"))
    assert [(run.name, run.stages) for run in alone] == [("bce3s-s0", 1)]


def test_the_small_main_table_is_one_set_and_says_so() -> None:
    table = build_table("cifar-main", "small")
    assert {row.shards.name for row in table.rows if row.shards is not None} == {"cifar10-lt-if100"}
    assert any("one of the six sets" in note for note in table.notes)
    assert len({row.shards.name for row in build_table("cifar-main", "full").rows if row.shards is not None}) == 6


def test_names_that_are_none_are_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="unknown table 'x'; known: ablation-cifar100, cifar-main"):
        build_table("x", "full")
    with pytest.raises(ConfigError, match="unknown budget 'x'; known: full, small"):
        build_table("cifar-main", "x")
    table = build_table("ablation-cifar100", "full")
    with pytest.raises(ConfigError, match="unknown row of ablation-cifar100 'x'; known: ce, bce, contrastive"):
        select_rows(table, "ce,x")
    with pytest.raises(ConfigError, match="--rows is empty"):
        select_rows(table, " ,")
    assert [row.name for row in select_rows(table, "bce, ce,bce")] == ["bce", "ce"]
    with pytest.raises(ConfigError, match="unknown row"):
        select_rows(build_table("cifar-main", "full"), "glmc-c10-if100")  # only published


def test_settings_for_all_rows_are_on_the_page_and_in_what_a_row_computes() -> None:
    table = build_table("ablation-cifar100", "full", ["epochs=2"])
    assert {run.config.epochs for run in plan_runs(table, table.rows, (0,), {}, Path("out"))} == {2}
    assert table.notes[-1] == "Other than the budget's, for all rows: epochs=2."
    set_to = ["epochs=100", "data.batch_size=128", "optimizer.learning_rate=0.02", "optimizer.warmup_epochs=7"]
    beyond = build_table("beyond-cifar100", "full", set_to)
    runs = {run.name: run.config for run in plan_runs(beyond, select_rows(beyond, None), (0,), {}, Path("out"))}
    assert runs["warm-up-s0"].loss.contrastive_warmup_epochs == 10
    larger = runs["batch-512-s0"]
    assert (larger.data.batch_size, larger.optimizer.learning_rate, larger.optimizer.warmup_epochs) == (512, 0.08, 7.0)


@pytest.mark.parametrize(
    ("name", "setting", "sentence"),
    [
        ("ablation-cifar100", "seed=5", "--set seed=… does not go with a table: name the seeds of its runs with --seeds"),
        ("ablation-cifar100", "dataset=demo", "--set dataset=… does not go with a table: its rows name theirs, take another table"),
        ("cifar-main", " device =cpu", "--set device=… does not go with a table: name the device with --device"),
        ("ablation-cifar100", "loss.name=ce", "is for all rows, and the row ce of ablation-cifar100 sets loss.name itself; leave it out"),
        ("beyond-cifar100", "loss.contrastive_warmup_epochs=3", "and the row warm-up of beyond-cifar100 sets loss.contrastive_warmup_ep"),
    ],
)
def test_a_setting_that_cannot_be_for_all_rows_is_a_sentence(name: str, setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        build_table(name, "full", ["epochs=2", setting])
