"""`bce3s report` as a user runs it, on a run that was really trained."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bce3s.config import ModelConfig
from bce3s.metrics import format_percent
from bce3s.seeds import summary_of
from tests import commands
from tests.bce3s.train.runs import CONFIG, train
from tests.browser import chromium, opened, wait_until
from tests.conftest import MakeShards

SMALL = replace(CONFIG, epochs=2, model=ModelConfig(arch="resnet8-cifar", projection_dim=8))


@pytest.fixture(scope="module")
def run(make_shards: MakeShards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ours"
    train(SMALL, make_shards(), folder)
    return folder


def test_a_run_becomes_a_page(run: Path, tmp_path: Path) -> None:
    done = commands.run("report", str(run), "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"report\.html \(\d\.\d MiB\): open it in a browser\n", done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "not shown" not in done.stderr

    with chromium() as browser, opened(browser, tmp_path / "report.html") as found:
        wait_until(found.page, "document.documentElement.dataset.drawn")
        headline = found.page.locator("dl.headline dd").all_inner_texts()
        assert headline[0].startswith(format_percent(summary_of(run)["last_epoch_no_tta"]["all"]))
        assert headline[1] == "no class"  # none has more than 100 training images
        assert found.page.locator("figure").count() == 10
        assert found.page.locator("#confusions img").count() >= 2
        assert found.console == []


def test_without_the_model_the_record_alone_is_shown_and_files_are_not_replaced_unasked(run: Path, tmp_path: Path) -> None:
    arguments = ("report", str(run), "--no-model", "--quiet", "--figures", "figures", "--format", "svg")
    done = commands.run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'figure id="training-losses"' in page
    assert 'figure id="classifier-cosines"' not in page
    assert "The cosines of the classifier&#39;s rows were not measured." in page
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert sorted(done.stdout.splitlines()[1].removeprefix("figures: ").split(", ")) == files
    assert {"accuracy-by-count.svg", "class-counts.svg", "throughput.svg", "training-losses.svg"} <= set(files)

    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    both = commands.run("report", str(run), "copy", "--no-model", "--out", "both.html", cwd=tmp_path)
    assert both.stderr.count("note: ours, copy: Not measured: it was asked for without the model.\n") == 1

    again = commands.run(*arguments, "--out", "other.html", cwd=tmp_path)
    assert (again.returncode, len(again.stderr.splitlines())) == (2, 1)
    assert "accuracy-by-group.svg is there already; add --overwrite" in again.stderr
    assert not (tmp_path / "other.html").exists()  # both or none
