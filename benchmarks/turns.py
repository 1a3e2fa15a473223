"""What the benchmarks share: the commit they measure, and figures of two sides that took turns."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from importlib.metadata import version
from pathlib import Path


def current_commit() -> str:
    """What is measured, as git names it; empty outside a checkout."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


def report(pairs: list[tuple[float, float]], batch_size: int, num_threads: int, packages: tuple[str, ...], json_file: Path | None) -> None:
    """Prints median and range of the ratios of (bare, ours) images/s, round by round, and writes them as JSON."""
    ratios = [ours / bare for bare, ours in pairs]
    commit = current_commit()
    figures = {
        "n": len(pairs),
        "bare_images_per_s_median": statistics.median(bare for bare, _ in pairs),
        "loader_images_per_s_median": statistics.median(ours for _, ours in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "decode_batch": batch_size,
        "threads": num_threads,
        **{package: version(package) for package in packages},
        "processor": platform.processor() or platform.machine(),
        "commit": commit,
    }
    print(f"ratio: median {figures['ratio_median']:.3f}, range {min(ratios):.3f} to {max(ratios):.3f}, n = {len(pairs)}", flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
