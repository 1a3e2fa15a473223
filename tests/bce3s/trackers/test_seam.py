"""Which trackers there are, what is missing, and that one which fails is let go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bce3s import trackers
from bce3s.trackers import Following, followed, require_tracker
from pipelines.types import BackendError, ConfigError
from tests.bce3s.progress.logs import SUMMARY, epoch_line, step_line
from tests.commands import ROOT


def test_an_unknown_tracker_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="unknown log 'mlflow'; known: none, tensorboard, wandb"):
        require_tracker("mlflow")
    require_tracker("none")


@pytest.mark.parametrize("name", sorted(trackers.TRACKERS))
def test_a_missing_package_is_named_with_the_line_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bce3s.trackers.seam.find_spec", lambda package: None)
    with pytest.raises(BackendError, match=rf"--log {name} needs the package {name}: pip install 'bce3s\[{name}\]'"):
        require_tracker(name)


def test_a_folder_of_its_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as trackers leave in the working folder, from which Python imports."""
    (tmp_path / "not_installed").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trackers.TRACKERS, "not_installed", "nowhere:Tracker")
    with pytest.raises(BackendError, match="--log not_installed needs the package not_installed"):
        require_tracker("not_installed")


def test_none_feeds_nobody(tmp_path: Path) -> None:
    with followed("none", tmp_path / "not there", 0, pytest.fail) as feeds:
        assert feeds == []


class Failing:
    """A tracker whose server goes away after some calls."""

    def __init__(self, calls: int) -> None:
        self.left, self.asked = calls, 0

    def write(self, figures: dict[str, float], step: int) -> None:
        self.asked += 1
        if self.asked > self.left:
            raise ConnectionError("the server\nis gone")

    def finish(self, figures: dict[str, float]) -> None:
        self.write(figures, 0)

    def close(self, *, well: bool) -> None:
        self.write({}, 0)


@pytest.mark.parametrize("calls", range(5))
def test_a_tracker_that_fails_says_so_once_and_is_asked_no_more(calls: int) -> None:
    said: list[str] = []
    tracker: Any = Failing(calls)
    following = Following("wandb", tracker, said.append)
    for line in (step_line(0, 19), epoch_line(0), SUMMARY):
        following.feed(line)
    following.close(well=True)
    assert tracker.asked == min(calls + 1, 4)
    expected = "NOT TRACKED: --log wandb failed (the server is gone) and is off from here on; metrics.jsonl has every line"
    assert said == [expected] * (calls < 4)


def test_the_table_of_trackers_imports_none_of_their_libraries() -> None:
    code = "import sys, bce3s.trackers; assert not {'torch', 'tensorboard', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)
