"""The diffs of docs/contributing.md apply to the tree as it is, and what they add keeps the contracts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^## (Add [^\n]+)$.*?^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
ADDED = ("csv", "sqrt", "pillow", "resnet14", "npz")  # the names by which the contract tests know what the diffs add
CONTRACTS = (
    *("tests/pipelines/datasets/test_datasets.py", "tests/bce3s/losses/test_losses.py", "tests/bce3s/test_recipes.py"),
    *("tests/pipelines/loaders/test_loader_contract.py", "tests/bce3s/models/test_recogniser.py", "tests/test_layers.py"),
    "tests/bce3s/export/test_formats.py",
)
COPIED = ("pipelines", "bce3s", "tests", "tools", "benchmarks", "docs", "pyproject.toml", "README.md")

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the checkout, outside of any repository."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name)  # with the times of the files, by which compiled functions are found again
        else:
            shutil.copy2(ROOT / name, tmp_path / name)
    return tmp_path


def apply(diff: str, tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent), "GIT_DIR": str(tree / "none")}
    return subprocess.run(
        ["git", "apply", *options, "-"], input=diff, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )


def test_there_is_a_diff_for_each_table_that_grows() -> None:
    assert list(DIFFS) == ["Add a data set", "Add a loss", "Add a loader", "Add a backbone", "Add an export format"]


def test_every_diff_applies(tree: Path) -> None:
    for title, diff in DIFFS.items():
        done = apply(diff, tree)
        assert done.returncode == 0, f"{title}: {done.stderr}"
        for path in re.findall(r"^\+\+\+ b/(.+)$", diff, re.MULTILINE):
            assert (tree / path).read_text() != ((ROOT / path).read_text() if (ROOT / path).exists() else None), path
        assert apply(diff, tree).returncode != 0, "a diff that applies twice has changed nothing"


@pytest.mark.slow
def test_what_the_diffs_add_keeps_the_contracts(tree: Path) -> None:
    touched = []
    for diff in DIFFS.values():
        assert apply(diff, tree).returncode == 0
        touched += re.findall(r"^\+\+\+ b/(.+)$", diff, re.MULTILINE)
    for judge in (["check"], ["format", "--check"]):
        linted = subprocess.run([sys.executable, "-m", "ruff", *judge, *touched], cwd=tree, capture_output=True, text=True, check=False)
        assert linted.returncode == 0, linted.stdout
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *CONTRACTS, "-k", " or ".join(ADDED)]
    tested = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=600, check=False)
    assert tested.returncode == 0, tested.stdout[-6000:]
    for name in ADDED:
        listed = subprocess.run([*command[:-1], name, "--collect-only"], cwd=tree, capture_output=True, text=True, timeout=120, check=False)
        assert listed.returncode == 0, f"no contract test knows {name}"
