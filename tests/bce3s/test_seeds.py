"""Several seeds: mean and standard deviation by hand, one command for all of them, and only what is missing on the second try."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bce3s.runlog import read_metrics
from bce3s.seeds import combine, is_finished, parse_seeds, seeds_table, summary_of
from pipelines.types import ConfigError
from tests.bce3s.train.runs import wait_until
from tests.commands import begin, finish


def summary(overall: float, few: float | None) -> dict[str, Any]:
    return {
        "kind": "summary",
        "split": "test",
        "last_epoch_no_tta": {"all": overall, "many": 1.0, "medium": 2.0, "few": few, "per_class": [0.0]},
    }


def test_mean_and_sample_deviation_by_hand() -> None:
    combined = combine({0: summary(50.0, None), 2: summary(52.0, None), 1: summary(57.0, None)})
    figures = combined["figures"]["last_epoch_no_tta"]
    # (50 + 52 + 57) / 3 = 53; ((9 + 1 + 16) / 2) ** 0.5 = 3.606
    assert figures["all"] == pytest.approx({"mean": 53.0, "sd": 13.0**0.5})
    assert figures["few"] is None
    assert (combined["n"], combined["seeds"]) == (3, [0, 1, 2])
    console = Console(width=120)
    with console.capture() as captured:
        console.print(seeds_table(combined))
    assert "53.00 ± 3.61" in captured.get()
    assert "n = 3" in captured.get()
    assert "n/a" in captured.get()


def test_one_seed_has_no_deviation() -> None:
    assert combine({3: summary(50.0, 1.0)})["figures"]["last_epoch_no_tta"]["all"] == {"mean": 50.0, "sd": None}


def selected(overall: float) -> dict[str, Any]:
    best = {**summary(overall, 3.0)["last_epoch_no_tta"], "epoch": 1}
    return {**summary(50.0, 3.0), "best_on_val_no_tta": best, "headline": "best_on_val_no_tta", "selected_by": "all on val"}


def test_the_headline_of_the_seeds_is_theirs_and_leads_the_table() -> None:
    combined = combine({0: selected(60.0), 1: selected(62.0)})
    assert (combined["headline"], combined["selected_by"]) == ("best_on_val_no_tta", "all on val")
    assert list(combined["figures"]) == ["best_on_val_no_tta", "last_epoch_no_tta"]
    with (console := Console(width=120)).capture() as captured:
        console.print(seeds_table(combined))
    assert captured.get().index("61.00") < captured.get().index("50.00")
    # A run from before summaries named it is of its last epoch.
    assert combine({0: summary(1.0, 1.0), 1: {**summary(2.0, 1.0), "headline": "last_epoch_no_tta"}})["headline"] == "last_epoch_no_tta"


def test_seeds_with_different_headlines_have_no_mean() -> None:
    for other in (summary(50.0, 1.0), {**selected(60.0), "selected_by": "balanced on val"}):
        with pytest.raises(
            ConfigError, match=r"seed 3's result is best_on_val_no_tta by all on val, seed 5's is .* --resume --select last"
        ):
            combine({3: selected(60.0), 5: other})


def test_a_figure_of_some_seeds_says_of_how_many() -> None:
    lost = {name: value for name, value in selected(60.0).items() if name != "best_on_val_no_tta"} | {"headline": "last_epoch_no_tta"}
    beside = {**selected(62.0), "headline": "last_epoch_no_tta", "last_epoch_features": {"split": "test", "compactness": {"mean": 0.5}}}
    few = {**lost, "last_epoch_no_tta": {**lost["last_epoch_no_tta"], "few": None, "ece": 4.0}}
    combined = combine({0: lost, 1: beside, 2: few})
    figures = combined["figures"]["last_epoch_no_tta"]
    assert figures["few"] == {"mean": 3.0, "sd": 0.0, "n": 2}
    assert figures["ece"] == {"mean": 4.0, "sd": None, "n": 1}
    assert "n" not in figures["all"]
    assert combined["features"] == {"compactness.mean": {"mean": 0.5, "sd": None, "n": 1}}
    assert combined["left_out"] == ["best_on_val_no_tta"]
    with (console := Console(width=200)).capture() as captured:
        console.print(seeds_table(combined))
    assert "3.00 ± 0.00 (n = 2)" in captured.get()
    assert "not of every seed and left out: best on val no TTA" in " ".join(captured.get().split())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("0,x", "takes whole numbers"), ("", "takes whole numbers"), ("1,1", "names a seed twice"), ("0,-1", "from 0 on")],
)
def test_a_list_that_is_none_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_seeds(text)


def test_one_command_trains_every_seed_and_resumes_only_what_is_missing(make_shards: Any, tmp_path: Path) -> None:
    out, output = tmp_path / "runs", tmp_path / "said.txt"
    command = [
        *("fast-train", "--dataset", "cifar10-lt", "--shards", str(make_shards().root), "--recipe", "cifar10lt_resnet20_40ep"),
        *("--epochs", "1", "--precision", "fp32", "--device", "cpu", "--out", str(out)),
    ]
    assert finish(begin([*command, "--seeds", "0,1"], output)) == 0, output.read_text()
    assert "n = 2 (seeds 0, 1)" in output.read_text()
    before = (out / "s0" / "metrics.jsonl").read_bytes()
    assert finish(begin([*command, "--seeds", "0,1,2", "--resume"], output)) == 0, output.read_text()
    combined = json.loads((out / "seeds.json").read_text())
    values = [summary_of(out / f"s{seed}")["last_epoch_no_tta"]["all"] for seed in (0, 1, 2)]
    assert combined["figures"]["last_epoch_no_tta"]["all"]["mean"] == pytest.approx(sum(values) / 3)
    assert (out / "s0" / "metrics.jsonl").read_bytes() == before
    totals = {line["total"] for seed in (0, 1, 2) for line in read_metrics(out / f"s{seed}") if line["kind"] == "epoch"}
    assert len(totals) == 3  # the seeds differ
    # What is there is of this config, or it is refused before anything trains.
    assert finish(begin([*command, "--seeds", "0,1,2", "--resume", "--loss", "ce"], tmp_path / "other.txt")) == 2
    assert "was trained with loss.name='bce3s', this command says 'ce'" in (tmp_path / "other.txt").read_text()
    assert finish(begin([*command, "--seeds", "4,1"], tmp_path / "again.txt")) == 2
    assert "s1 holds a run already" in (tmp_path / "again.txt").read_text()
    assert not (out / "s4").exists()
    # Overwritten and stopped in the first one, the others hold nothing that a continuation could take for its own.
    process = begin([*command, "--seeds", "0,1", "--overwrite", "--epochs", "40"], tmp_path / "stopped.txt")
    wait_until(lambda: not list((out / "s1" / "checkpoints").iterdir()) and bool(list((out / "s0" / "checkpoints").glob("*.safetensors"))))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 0, (tmp_path / "stopped.txt").read_text()
    assert "and saved; continue with: bce3s fast-train" in (tmp_path / "stopped.txt").read_text()
    assert not is_finished(out / "s0")
    assert not is_finished(out / "s1")
