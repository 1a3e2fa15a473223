"""`--help` is instant: nothing heavy is imported for it, and it takes no longer than that of any small typer application."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bce3s import __version__
from bce3s.cli import COMMANDS, build_app

ROOT = Path(__file__).resolve().parents[3]
HEAVY = {"torch", "numba", "altair", "matplotlib", "onnx", "onnxruntime", "PIL", "nvidia.dali", "timm", "tensorboard", "wandb"}
LIMIT = 2.0  # times the bare application
ROUNDS = 6
BARE = """
import typer
app = typer.Typer()
@app.command()
def one(name: str = "a") -> None:
    "Do one thing."
@app.command()
def other(name: str = "b") -> None:
    "Do another."
app()
"""


def imported_for(*arguments: str) -> set[str]:
    code = (
        "import sys; from bce3s.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "print('MODULES', *sys.modules)"
    )
    found = python("-c", code, *arguments)
    assert found.returncode == 0, found.stderr
    return set(found.stdout.rpartition("MODULES ")[2].split())


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_the_list_of_commands_imports_typer_and_little_else() -> None:
    modules = imported_for("--help")
    assert not modules & {*HEAVY, "numpy", "fsspec", "asyncio", "rich.progress", "bce3s.config", "pipelines.types"}
    assert not [name for name in modules if name.endswith(".command")]


def test_the_help_of_a_command_imports_neither_numpy_nor_another_command() -> None:
    modules = imported_for("fast-train", "--help")
    assert not modules & {*HEAVY, "numpy", "fsspec", "asyncio", "rich.progress"}
    assert [name for name in modules if name.endswith(".command")] == ["bce3s.fast_train.command"]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_no_command_imports_torch(command: str) -> None:
    assert not imported_for(command, "--help") & HEAVY


def fastest_s(*commands: Sequence[str]) -> list[float]:
    """The shortest of two starts of each command, in turns, so that what else the machine does hits all of them."""
    took_s: list[list[float]] = [[] for _ in commands]
    for _ in range(2):
        for command, own_s in zip(commands, took_s, strict=True):
            begun_s = time.perf_counter()
            assert python(*command).returncode == 0
            own_s.append(time.perf_counter() - begun_s)
    return [min(own_s) for own_s in took_s]


def test_the_list_of_commands_is_there_within_twice_the_time_of_a_bare_application(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(BARE)
    best_bare_s = best_ours_s = float("inf")
    for _ in range(ROUNDS):  # minima: a busy machine makes starts longer, none shorter
        bare_s, ours_s = fastest_s([str(tmp_path / "bare.py"), "--help"], ["-m", "bce3s.cli", "--help"])
        best_bare_s, best_ours_s = min(best_bare_s, bare_s), min(best_ours_s, ours_s)
        if best_ours_s <= LIMIT * best_bare_s:
            return
    raise AssertionError(f"--help takes {best_ours_s:.2f} s, a bare typer application {best_bare_s:.2f} s")


def test_version_and_short_help() -> None:
    assert CliRunner().invoke(build_app(), ["--version"]).output.startswith(f"bce3s {__version__} (torch 2.")
    for arguments in (["-h"], ["evaluate", "-h"]):
        found = CliRunner().invoke(build_app(), arguments)
        assert found.exit_code == 0
        assert "Usage:" in found.output
    shown = CliRunner().invoke(build_app(), ["--help"]).output
    assert all(name in shown for name in COMMANDS)
    assert "Exit status: 0 done" in shown
