"""The profile as JSON: every sample of every row, and what a later reader must know to compare it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bce3s import __version__
from bce3s.device import environment
from bce3s.throughput.advice import Advice
from bce3s.throughput.profile import Profile
from bce3s.throughput.rows import PROFILE_FORMAT, PROFILE_VERSION, VIEWS_PER_DECODED
from bce3s.throughput.timing import Budget
from bce3s.throughput.verdict import Verdict
from bce3s.throughput.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A finished profile with its verdict, None where a row it needs was not measured, in sentences, and how busy the machine was."""

    profile: Profile
    verdict: Verdict | None
    advice: Advice | None
    sentences: list[str]
    load_average: float


def profile_record(workload: Workload, budget: Budget, findings: Findings) -> dict[str, Any]:
    """Everything of a profile, ready for `json.dumps`."""
    shards = workload.shards
    return {
        "format": PROFILE_FORMAT,
        "version": PROFILE_VERSION,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": checkout_commit(),
        "hardware": hardware(workload.device),
        "environment": {**environment(workload.device), "bce3s": __version__},
        "data": {
            "dataset": shards.dataset,
            "fingerprint": shards.fingerprint,
            "shards": shards.address,
            "num_train": len(workload.split),
            "mean_encoded_bytes": float(workload.split.sizes_N.mean()),
        },
        "load_average_before": findings.load_average,
        "page_cache": findings.profile.page_cache,
        "loader": workload.choice.name,
        "precision": workload.placement.precision,
        "budget": asdict(budget),
        "views_per_decoded_image": VIEWS_PER_DECODED,
        "rows": [row.to_dict() for row in findings.profile.rows],
        "facts": asdict(findings.profile.facts),
        "verdict": None if findings.verdict is None else findings.verdict.to_dict(),
        "advice": None if findings.advice is None else asdict(findings.advice),
        "sentences": findings.sentences,
        "config": asdict(workload.config),
    }


def to_bytes(record: dict[str, Any]) -> bytes:
    """JSON, indented."""
    return (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, its cores, and the GPU with its driver where the run uses one."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _driver() -> str:
    return (_output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines() or ["unknown"])[0]


def checkout_commit() -> str | None:
    """The commit of the checkout this code runs from, with "+changes" where it was edited; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return (commit + ("+changes" if changed else "")) or None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
