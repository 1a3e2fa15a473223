"""`bce3s doctor` for real: packages that are broken, absent or crash are rows, and the exit status says whether training can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bce3s.doctor.software import EXTRAS

ROOT = Path(__file__).resolve().parents[3]


def doctor(*arguments: str, packages: Path, limit: int = 4096, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with `packages` in front of those that are installed."""
    environment = {**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}", "COLUMNS": "100", **variables}
    command = ["bash", "-c", f'ulimit -n {limit}; exec "$0" -m bce3s.cli doctor "$@"', sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False, cwd=packages)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Quick stand-ins for the extras: what is proven here is not their import time."""
    for modules in EXTRAS.values():
        for module in modules:
            (tmp_path / f"{module}.py").write_text("__version__ = '1.0'")
    (tmp_path / "wandb.py").write_text("import no_such_module")
    (tmp_path / "timm.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "ffcv.py").write_text("raise OSError('libopencv_imgproc.so.406: cannot open shared object file')")
    return tmp_path


def test_a_broken_machine_is_described_row_by_row(packages: Path) -> None:
    (packages / "nvidia").mkdir()
    (packages / "nvidia" / "__init__.py").write_text("raise ImportError('libcufile.so.0 is damaged')")
    (packages / "numpy.py").write_text("raise ImportError('numpy was built for another Python')")
    (packages / "torch.py").write_text("raise ImportError('libtorch_cpu.so: undefined symbol: iJIT_NotifyEvent')")
    path = f"{Path(sys.executable).parent}:/bin:/usr/bin"
    found = doctor("--json", packages=packages, limit=200, PATH=path)
    assert found.returncode == 1, found.stderr
    assert found.stderr == ""
    said = json.loads(found.stdout)
    rows = {row["name"]: row for row in said["rows"]}
    for row in said["rows"]:
        assert set(row) == {"section", "name", "status", "value", "remedy", "needed", "figures"}
        assert row["status"] in ("ok", "advice", "missing")
        assert row["status"] == "ok" or row["remedy"], row
    assert rows["DALI"]["status"] == "missing"
    assert rows["DALI"]["value"] == "does not work here: ImportError: libcufile.so.0 is damaged"
    assert rows["DALI"]["remedy"] == "pip install --force-reinstall nvidia-dali-cuda130"
    assert "libopencv_imgproc.so.406" in rows["FFCV"]["value"]
    assert rows["wandb"]["value"] == "wandb does not work here: ModuleNotFoundError: No module named 'no_such_module'"
    assert rows["timm"]["value"] == "timm does not work here: crashes (SIGSEGV)"
    assert rows["torch"]["value"] == "does not work here: ImportError: libtorch_cpu.so: undefined symbol: iJIT_NotifyEvent"
    assert rows["numpy"]["remedy"] == "pip install --force-reinstall numpy"
    assert rows["numba"]["remedy"] == "mend numpy first"
    assert rows["memory"]["figures"]["free_bytes"] > 0
    assert (rows["pillow"]["status"], rows["pillow"]["needed"]) == ("ok", True)
    assert rows["report"]["status"] == "ok"
    assert (rows["open files"]["status"], rows["open files"]["figures"]["soft"]) == ("advice", 200)
    assert rows["disk"]["figures"]["path"] == str(packages)
    verdict = said["verdict"]
    assert not verdict["can_train"]
    assert verdict["sentence"].startswith("Training cannot run here yet. torch: does not work here")
    assert "DALI: does not work here" in verdict["sentence"]


def test_real_shards_decide_the_loader_and_the_command_is_ready_to_paste(make_shards: Any, packages: Path) -> None:
    shards = make_shards()
    found = doctor("--shards", str(shards.root), "--path", str(packages), packages=packages)
    assert found.returncode == 0, found.stdout + found.stderr
    *lines, blank, command = found.stdout.splitlines()
    assert blank == ""
    device = " --set accumulate_steps" in command  # only where memory is short
    expected = f"bce3s fast-train --dataset cifar10-lt --shards {shards.root} --loader resident --batch-size 64"
    assert command == expected or (device and command.startswith(expected)) or command.startswith(f"{expected} --set data.num_threads=")
    assert any(line.startswith("Training can run here, on ") for line in lines)
    assert any(line.startswith("Loader resident: the decoded set takes 0 MiB, less than half of") for line in lines)
    statuses = [line.split()[0] for line in lines if ": " in line and not line.startswith(("Training", "Loader", "Threads", "Batch"))]
    assert set(statuses) <= {"ok", "advice", "missing"}
    assert "\x1b" not in found.stdout


def test_a_mistake_is_one_sentence_at_once(packages: Path) -> None:
    for arguments, sentence in (
        (["--shards", "nowhere"], "no shards at nowhere: the folder does not exist"),
        (["--path", "nowhere"], "--path nowhere is not a folder; name one on the disk that is to be measured"),
    ):
        found = doctor(*arguments, packages=packages)
        assert found.returncode == 2
        assert sentence in found.stderr
        assert len(found.stderr.splitlines()) == 1
        assert found.stdout == ""


@pytest.mark.slow
def test_this_machine_with_all_that_is_installed_can_train(tmp_path: Path) -> None:
    found = doctor("--json", packages=tmp_path)
    said = json.loads(found.stdout)
    assert (found.returncode, said["verdict"]["can_train"]) == (0, True), said["verdict"]
    assert {row["name"] for row in said["rows"]} >= {"Python", "torch", "DALI", "FFCV", "driver", "disk", *EXTRAS}
