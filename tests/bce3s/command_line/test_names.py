"""Names that the shell completes are those there are, and completing them imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bce3s.command_line import names
from bce3s.losses import LOSSES
from bce3s.models import ARCHS
from bce3s.recipes import RECIPES
from bce3s.reproduce.tables import TABLES
from pipelines.datasets import DATASETS
from pipelines.loaders import LOADERS

ROOT = Path(__file__).resolve().parents[3]


def test_the_names_are_those_of_the_registries() -> None:
    assert names.dataset_names() == tuple(DATASETS)
    assert names.loader_names() == ("auto", *LOADERS)
    assert names.method_names() == tuple(LOSSES)
    assert names.arch_names() == tuple(ARCHS)
    assert names.table_names() == tuple(TABLES)
    assert names.recipe_names() == tuple(RECIPES)
    assert {"epochs=", "optimizer.learning_rate=", "data.order.sampling="} <= set(names.setting_names())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a `bce3s` as pip would write it; it refuses to import torch or numba."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "bce3s"
    heavy = "sys.modules.update(torch=None, numba=None, matplotlib=None)"
    script.write_text(f"#!{sys.executable}\nimport sys\n{heavy}\nfrom bce3s.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    return folder


def bash(script: str, program: Path) -> str:
    environment = {**os.environ, "PATH": f"{program}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(["bash", "--norc", "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    return found.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["re"], ["retrain-classifier", "report", "reproduce"]),
        (["fast-train", "--dataset", "ci"], ["cifar10-lt", "cifar100-lt"]),
        (["fast-train", "--arch", "resnext"], ["resnext50-32x4d"]),
        (["fast-train", "--method", "b"], ["bce3s", "bce", "balanced-softmax", "bcl"]),
        (["fast-train", "--loader", "f"], ["ffcv"]),
        (["fast-train", "--set", "optimizer.le"], ["optimizer.learning_rate="]),
        (["profile", "--recipe", "demo"], ["demo_resnet20_12ep"]),
        (["retrain-classifier", "run", "--method", "t"], ["tau-norm"]),
        (["reproduce", "ab"], ["ablation-cifar100"]),
        (["evaluate", "--ad"], ["--adjust-logits"]),
    ],
)
def test_the_program_completes(line: list[str], expected: list[str], program: Path) -> None:
    environment = {"_BCE3S_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["bce3s", *line]), "COMP_CWORD": str(len(line))}
    found = subprocess.run(
        [str(program / "bce3s")],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.split() == expected


def test_bash_itself_completes_after_the_line_that_installs_it(program: Path) -> None:
    register = 'eval "$(SHELL=/bin/bash _BCE3S_COMPLETE=source_bash bce3s)"; complete -p bce3s; '
    press_tab = "COMP_WORDS=(bce3s fast-train --dataset cifar10-); COMP_CWORD=3; _bce3s_completion bce3s; echo ${COMPREPLY[@]}"
    registered, completed = bash(register + press_tab, program).splitlines()
    assert registered == "complete -o default -F _bce3s_completion bce3s"
    assert completed == "cifar10-lt"
