"""A part of the small ablation on real CIFAR-100: the table is complete, and says of its claims what its own figures say."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import begin, finish


@pytest.mark.slow
def test_three_rows_of_the_ablation_on_real_images(shared_data: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, shared_data / "unpack.py", "cifar100", tmp_path / "source"], check=True, timeout=120)
    output = tmp_path / "said.txt"
    command = ["reproduce", "ablation-cifar100", "--budget", "small", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")]
    # A quarter of the small budget's epochs, and two seeds: enough for figures that are not chance.
    process = begin([*command, "--rows", "ce,bce,bce3s", "--seeds", "0,1", "--jobs", "2", "--set", "epochs=10"], output)
    assert finish(process, timeout_s=900) == 0, output.read_text()
    record = json.loads((tmp_path / "out" / "ablation-cifar100.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    for name in ("ce", "bce", "bce3s"):
        row = rows[name]
        assert (row["n"], row["missing_seeds"]) == (2, [])
        values = [row["by_seed"][seed]["last_epoch_no_tta"]["all"] for seed in ("0", "1")]
        assert row["figures"]["last_epoch_no_tta"]["all"]["mean"] == pytest.approx(statistics.fmean(values))
        assert min(values) > 10  # 20 classes: chance is 5
        assert all(row["figures"]["last_epoch_no_tta"][group] is not None for group in ("many", "medium", "few"))
    for claim in record["claims"]:
        trained = {claim["better"], claim["worse"]} <= {"ce", "bce", "bce3s"}
        assert (claim["interval"] is not None) == trained
        if not trained:
            assert claim["verdict"] == "not decided"
            continue
        low, high = claim["interval"]
        assert claim["verdict"] == ("holds" if low > 0 else "against" if high < 0 else "not decided") or low == high
    page = (tmp_path / "out" / "ablation-cifar100.md").read_text()
    assert page.count("0 of 2") == 2 * 3  # the rows that were not trained, in the headline and in the cost
