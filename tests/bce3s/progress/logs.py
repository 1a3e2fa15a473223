"""Logs of runs for tests: the lines that a run writes, and a folder with its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = {
    **{"dataset": "cifar10-lt", "epochs": 10, "eval_every": 2, "log_every": 20},
    **{"loss": {"name": "bce3s"}, "model": {"arch": "resnet32-cifar"}, "retrain": {"epochs": 6}},
}
ENVIRONMENT = {"gpu": "NVIDIA H100", "precision": "bf16", "world_size": 1, "gpu_memory_bytes": 80 << 30}


def step_line(epoch: int, step: int, **others: Any) -> dict[str, Any]:
    """Of a run with 100 steps an epoch that take half a second each."""
    rates = {"images_per_s": 1000.0, "views_per_s": 3000.0, "data_wait_share": 0.02, "ready_share": 1.0}
    terms = {"total": 9.0 - epoch - step / 100, "joint": 2.5, "class_subset_size": 7.0, "uniform": 6.5}
    where = {"epoch": epoch, "step": step, "num_steps": 100, "epochs": 10, "epoch_s": (step + 1) * 0.5}
    return {"kind": "step", **where, **rates, "device_memory_bytes": 3 << 30, **terms, **others}


def epoch_line(epoch: int, *, evaluated: bool = False) -> dict[str, Any]:
    rates = {"images_per_s": 1000.0, "train_s": 50.0, "data_wait_share": 0.02, "ready_share": 1.0}
    figures = {"eval_s": 4.0, "all": 40.0 + epoch, "many": 50.0, "medium": 20.0, "few": None, "balanced": 40.0, "ece": 3.0}
    where = {"epoch": epoch, "num_steps": 100, "epochs": 10}
    return {"kind": "epoch", **where, **rates, "total": 8.5 - epoch, "joint": 2.4, "split": "val", **(figures if evaluated else {})}


def lines_until(epoch: int, step: int) -> list[dict[str, Any]]:
    """Of all epochs before, evaluated after every second one, and of this one until `step`."""
    lines: list[dict[str, Any]] = []
    for before in range(epoch):
        lines += [step_line(before, each) for each in range(19, 100, 20)] + [epoch_line(before, evaluated=before % 2 == 1)]
    return lines + [step_line(epoch, each) for each in range(19, step + 1, 20)]


RESULT = {"all": 54.7, "many": 60.0, "medium": 40.0, "few": None}
SUMMARY = {"kind": "summary", "headline": "last_epoch_no_tta", "split": "test", "last_epoch_no_tta": RESULT}


def write_run(folder: Path, lines: list[dict[str, Any]], **environment: Any) -> Path:
    """A run folder as far as its record and its log go."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "environment.json").write_text(json.dumps({**ENVIRONMENT, **environment}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
