"""The three views of a step, every way we can write them, as ratios to torch's reference and as shares of the copy bandwidth.

python benchmarks/mix.py [--device cuda] [--json FILE]

The ways take turns, `--rounds` times, so that a machine whose speed drifts slows all; ratios are taken round by round. Bytes are those
that must move: both batches read once, three views written once. The copy bandwidth is that of a copy which moves as many bytes, half
read and half written, measured in the same rounds. On a CPU fresh memory is shown apart from memory that is written again, because
the system hands it out page by page.
"""

from __future__ import annotations

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from turns import current_commit

from bce3s.cli import run_app
from bce3s.device import resolve_device
from pipelines.augment.mix import channel_statistics, draw_mix, mix_views, write_views_reference
from pipelines.config import AugmentConfig

# Images of the instance stream and their side in pixels: CIFAR's usual step, and ImageNet's on one and on several devices.
SIZES = ((64, 32), (64, 224), (256, 224))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
Work = Callable[[], object]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def ways_to_mix(num_sources: int, side: int, dtype: torch.dtype, device: torch.device, compiled: bool) -> tuple[dict[str, Work], int]:
    """Name → one call, "copy" among them, and the bytes each call has to move."""
    config = AugmentConfig()
    mean, std = channel_statistics(config, device)
    mix = torch.from_numpy(draw_mix(0, 0, 0, side, config)).to(device)
    images = torch.randint(0, 256, (2 * num_sources, side, side, 3), dtype=torch.uint8, device=device)
    shape = (3 * num_sources, side, side, 3)
    fixed = functools.partial(torch.empty, shape, dtype=dtype, device=device)
    reused = mix_views(images, mix, mean, std, dtype)
    views_VHWC = fixed()

    def reference() -> None:
        write_views_reference(images, mix, mean, std, fixed())

    ways: dict[str, Work] = {
        "torch": reference,
        "torch, memory kept": lambda: write_views_reference(images, mix, mean, std, views_VHWC),
        "mix_views": lambda: mix_views(images, mix, mean, std, dtype),
        "mix_views, memory kept": lambda: mix_views(images, mix, mean, std, dtype, out=reused),
    }
    if compiled:
        ways["torch.compile, memory kept"] = functools.partial(torch.compile(write_views_reference), images, mix, mean, std, views_VHWC)
    if device.type == "cuda":
        from pipelines.augment.mix_triton import write_views

        for block, warps in ((512, 2), (1024, 4), (1024, 8), (2048, 8), (4096, 8)):
            ways[f"triton, {block} levels, {warps} warps"] = functools.partial(
                write_views, images, mix, mean, std, views_VHWC, block_levels=block, num_warps=warps
            )
    moved_bytes = images.nbytes + views_VHWC.nbytes
    source, target = (torch.zeros(moved_bytes // 2, dtype=torch.uint8, device=device) for _ in range(2))
    ways["copy"] = lambda: target.copy_(source)
    return ways, moved_bytes


def time_s(work: Work, device: torch.device) -> float:
    """Seconds a call, over enough calls for a steady clock."""
    if device.type == "cuda":
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        num_calls = 50
        started.record()
        for _ in range(num_calls):
            work()
        ended.record()
        ended.synchronize()
        return float(started.elapsed_time(ended)) / 1e3 / num_calls
    started_s, num_calls = time.perf_counter(), 0
    while num_calls < 3 or time.perf_counter() - started_s < 0.02:
        work()
        num_calls += 1
    return (time.perf_counter() - started_s) / num_calls


def measure(ways: dict[str, Work], moved_bytes: int, rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Median of each way: ms, GB/s, its share of the copy bandwidth, its speed as a ratio to torch's reference, and that ratio's range."""
    for work in ways.values():
        time_s(work, device)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            found[name].append(time_s(work, device))
    rows = {}
    for name, seconds in found.items():
        ratios = [reference / ours for reference, ours in zip(found["torch"], seconds, strict=True)]
        rows[name] = {
            "ms": statistics.median(seconds) * 1e3,
            "gb_per_s": moved_bytes / statistics.median(seconds) / 1e9,
            "share_of_copy": statistics.median(copy / ours for copy, ours in zip(found["copy"], seconds, strict=True)),
            "ratio_to_torch": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return rows


@app.command()
def main(
    device_name: Annotated[str, typer.Option("--device", help="cpu, cuda or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the views: bf16, fp32 or fp16.")] = "bf16",
    rounds: Annotated[int, typer.Option(help="Measurements of each way.")] = 9,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure torch.compile, too (slow to compile).")] = True,
    threads: Annotated[int, typer.Option(help="torch threads on a CPU; 0 is torch's default.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure every size and print one table each."""
    device = resolve_device(device_name)
    if threads:
        torch.set_num_threads(threads)
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "torch": torch.__version__,
        "commit": current_commit(),
        "n": rounds,
        "sizes": {},
    }
    for num_sources, side in SIZES:
        ways, moved_bytes = ways_to_mix(num_sources, side, DTYPES[precision], device, compiled)
        rows = figures["sizes"][f"{num_sources}x{side}px"] = measure(ways, moved_bytes, rounds, device)
        print(f"\nB = {num_sources}, {side} px, {precision}, {figures['device']}, {figures['threads']} threads, {moved_bytes / 1e6:.1f} MB")
        for name, row in rows.items():
            print(
                f"  {name:30} {row['ms']:9.3f} ms {row['gb_per_s']:8.1f} GB/s, {row['share_of_copy']:5.0%} of a copy; "
                f"{row['ratio_to_torch']:6.2f} × torch ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
            )
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run_app(app)
