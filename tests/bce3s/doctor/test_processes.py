"""Probes: whatever a package does when it is imported (raise, crash, hang, talk) is a fact about it, and about nothing else."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from bce3s.doctor import processes
from bce3s.doctor.processes import probe


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of all others on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_package_that_works_has_a_version_however_much_it_prints(packages: Path) -> None:
    (packages / "talking.py").write_text("print('hello'); print('{\"subject\": \"talking\"}')\n__version__ = '1.2'")
    found = probe([["safetensors", "talking"]], 30)
    assert found["safetensors"]["version"][0].isdigit()
    assert found["talking"]["version"] == "1.2"


def test_each_failure_is_its_own(packages: Path) -> None:
    (packages / "raising.py").write_text("raise OSError('libbroken.so: cannot open\\n shared object file')")
    (packages / "leaving.py").write_text("import os; os._exit(3)")
    (packages / "crashing.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (packages / "fine.py").write_text("import warnings; warnings.warn('driver too old'); __version__ = '1'")
    found = probe([["absent", "raising", "crashing", "leaving", "fine"]], 30)
    assert found == {
        "absent": {"error": "ModuleNotFoundError: No module named 'absent'"},
        "raising": {"error": "OSError: libbroken.so: cannot open shared object file"},
        "crashing": {"error": "crashes (SIGSEGV)"},
        "leaving": {"error": "ends its process with status 3"},
        "fine": {"version": "1", "warnings": ["driver too old"]},
    }


def test_one_that_hangs_costs_the_time_that_was_given_and_nothing_else(packages: Path) -> None:
    (packages / "hanging.py").write_text("import time; time.sleep(600)")
    (packages / "fine.py").write_text("__version__ = '1'")
    started_s = time.monotonic()
    found = probe([["fine"], ["hanging", "behind"]], 4.0)
    assert time.monotonic() - started_s < 12
    assert found["fine"]["version"] == "1"
    assert found["hanging"] == found["behind"] == {"error": "does not answer"}


def test_an_interrupt_leaves_no_process_behind(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = tmp_path / "number"
    (packages / "hanging.py").write_text(f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(600)")

    def interrupted(process: subprocess.Popen[bytes], deadline_s: float) -> str:
        while not (number.exists() and number.read_text()):
            time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe([["hanging"]], 60)
    assert not Path(f"/proc/{number.read_text()}").exists()


def test_the_working_folder_shadows_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "safetensors.py").write_text("raise ImportError('mine')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    assert "version" in probe([["safetensors"]], 30)["safetensors"]
