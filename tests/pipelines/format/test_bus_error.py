"""A mapped file that is cut short under its reader: one sentence and exit status 2 instead of a silent death."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import mmap, sys, threading
from pipelines.format.bus_error import explain_bus_errors
explain_bus_errors("shard x was cut short; copy it again")
with open(sys.argv[1], "w+b") as file:
    file.truncate(1 << 16)
    mapped = mmap.mmap(file.fileno(), 0)
    file.truncate(0)
read = lambda: print(mapped[5000])
if sys.argv[2] == "thread":
    reader = threading.Thread(target=read)
    reader.start()
    reader.join()
read()
"""


@pytest.mark.parametrize("where", ["main", "thread"])
def test_reading_what_is_gone_is_a_sentence_in_any_thread(tmp_path: Path, where: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "mapped"), where]
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 2
    assert found.stderr.strip() == "error: shard x was cut short; copy it again"
    assert found.stdout == ""
