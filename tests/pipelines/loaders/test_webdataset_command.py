"""The command line trains from a URL, evaluates from it or from a local copy, and says what is wrong with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nginx import running_nginx
from tests.pipelines.loaders.streams import MakeShards

ROOT = Path(__file__).resolve().parents[3]
FAST = ["--recipe", "cifar10lt_resnet20_40ep", "--epochs", "1", "--precision", "fp32", "--device", "cpu"]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-W", "error", "-m", "bce3s.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_run_from_a_url_is_evaluated_from_there_and_from_a_folder(make_shards: MakeShards, tmp_path: Path) -> None:
    shards = make_shards(val=2)
    with running_nginx(Path(shards.root)) as nginx:
        train = ["fast-train", "--dataset", "cifar10-lt", "--shards", nginx.url, *FAST, "--out", "run"]
        trained = run(*train, "--loader", "auto", cwd=tmp_path)
        assert trained.returncode == 0, trained.stderr
        assert "loader webdataset (shards at a URL)" in trained.stdout
        assert json.loads((tmp_path / "run" / "environment.json").read_text())["shards"] == nginx.url
        again = run("evaluate", "run", "--json", cwd=tmp_path)
        local = run("evaluate", "run", "--json", "--shards", str(shards.root), cwd=tmp_path)
        assert again.returncode == local.returncode == 0, again.stderr + local.stderr
        assert json.loads(again.stdout) == json.loads(local.stdout)
    gone = run("evaluate", "run", cwd=tmp_path)
    assert gone.returncode == 2
    assert gone.stderr.startswith(f"error: cannot read {nginx.url}/manifest.json (Connection refused)")
    assert len(gone.stderr.strip().splitlines()) == 1
