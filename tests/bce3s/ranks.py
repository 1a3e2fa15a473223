"""Ranks as processes of their own: what each computes, run as `python ranks.py TASK FOLDER`, and how a test starts them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bce3s.distributed import (
    LostRankError,
    World,
    is_lost_rank,
    join_world,
    leave_world,
    load_running_statistics,
    running_statistics,
    synced_batch_norm,
)
from tests.object_store import free_port

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
TIMEOUT_S = 60


# ---- what a rank runs


def network() -> nn.Module:
    """Batch-norms behind a convolution, whose means are far from zero, and one in a submodule."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), inner, nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, momentum=0.3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand(parameter.shape))
    return model


def two_training_steps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a loss that sums over samples, each with a weight of its own, after two passes of training."""
    images = images.clone().requires_grad_()
    for _ in range(2):
        output = model(images)
    weights = torch.linspace(-1, 1, output[0].numel()).reshape(output[0].shape).to(output.dtype)
    (output.square() * weights * (1 + images.detach().mean((1, 2, 3), keepdim=True))).sum().backward()
    assert images.grad is not None
    return {"output": output.detach(), "input_gradient": images.grad}


def whole_batch(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(12, 2, 6, 5, generator=generator) * 2 + 3).to(dtype)


def shares_of(batch: Tensor) -> list[Tensor]:
    """For three ranks, not all alike."""
    return list(batch.split([4, 3, 5]))


def train_in(world: World, dtype: torch.dtype) -> dict[str, Any]:
    model = network().to(dtype)
    names, parameters = list(model.state_dict()), list(model.parameters())
    model = synced_batch_norm(model, world)
    assert list(model.state_dict()) == names
    assert all(one is two for one, two in zip(parameters, model.parameters(), strict=True))
    images = whole_batch(dtype) if world.size == 1 else shares_of(whole_batch(dtype))[world.rank]
    found: dict[str, Any] = two_training_steps(model, images)
    found["parameter_gradients"] = [world.sum(p.grad) for p in model.parameters() if p.grad is not None]
    found["buffers"] = dict(model.named_buffers())
    model.eval()
    found["evaluated"] = model(images).detach()
    return found


def half_precision_in(world: World) -> Tensor:
    model = synced_batch_norm(nn.BatchNorm2d(2), world)
    images = whole_batch() if world.size == 1 else shares_of(whole_batch())[world.rank]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output: Tensor = model(images.bfloat16().requires_grad_())
    output.sum().backward()
    return output.detach()


def computed_together(world: World) -> dict[str, Any]:
    agreement = world.agreement()
    rank, dtypes = world.rank, (torch.float32, torch.int64, torch.bool)
    own_batch_norm = nn.BatchNorm2d(3)
    own_batch_norm(whole_batch()[:, :1].expand(-1, 3, -1, -1) * (rank + 1))
    load_running_statistics(own_batch_norm, world.mean(running_statistics(own_batch_norm)))
    weight = torch.full((2, 2), float(rank), requires_grad=True)
    return {
        "world": (world.rank, world.size, world.local_rank, world.restart, world.is_main),
        "rows": {str(dtype): world.gather_rows(torch.full((2, 1, 3), rank).to(dtype)) for dtype in dtypes},
        "strided": world.gather_rows((weight * 2).t()),
        "sum": world.sum(torch.tensor([1.0, rank])),
        "counts": world.sum(torch.tensor([2**40 + rank])),
        "mean": world.mean(torch.tensor([1.0, rank])),
        # Only rank 1 ever says yes.
        "agreed": [agreement.exchange(rank == 1 and step == 1, False) for step in range(4)],
        "settled": (agreement.exchange(True, True), agreement.settle(), agreement.exchange(False, False), agreement.settle()),
        "running": running_statistics(own_batch_norm),
        "trained": train_in(world, torch.float32),
        "trained_double": train_in(world, torch.float64),
        "half": half_precision_in(world),
    }


def compute(out: Path) -> None:
    world = join_world("cpu", timeout_s=TIMEOUT_S)
    torch.save(computed_together(world), out / f"{world.rank}.pt")


def meet_die_and_meet(out: Path) -> None:
    """At the first start rank 1 ends without a word."""
    world = join_world("cpu", timeout_s=TIMEOUT_S / 4)
    world.sum(torch.ones(1))
    if world.restart < 2:
        os._exit(9 if world.rank == 1 else 0)
    world.agreement().exchange(True)
    world.sum(torch.ones(1))
    (out / f"{world.rank}.txt").write_text(repr(world))
    leave_world()


def meet_and_lose_one(out: Path) -> None:
    """Rank 1 ends without a word; rank 0 must hear of it in a collective and in an agreement, and end by itself."""
    world = join_world("cpu", timeout_s=TIMEOUT_S)
    agreement = world.agreement()
    agreement.exchange(False)
    agreement.settle()
    if world.rank == 1:
        os._exit(9)
    sentences = []
    actions: list[Callable[[], object]] = [
        lambda: world.sum(torch.ones(4)),
        lambda: world.gather_rows(torch.ones(1, 4)),
        lambda: (agreement.exchange(True), agreement.exchange(True)),
        lambda: train_in(world, torch.float32),
    ]
    for action in actions:
        try:
            action()
        except Exception as error:
            if not (is_lost_rank(error) and is_lost_rank(LostRankError.of(error))):
                raise
            sentences.append(str(LostRankError.of(error)))
    torch.save({"world": repr(world), "sentences": sentences}, out / "0.pt")


# ---- starting them


def torchrun_environments(size: int) -> list[dict[str, str]]:
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size), "TORCHELASTIC_RESTART_COUNT": "2"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def srun_environments(size: int) -> list[dict[str, str]]:
    """As of a job of one node, whose name stands for this machine; the port is set, as the job's own may be taken here."""
    common = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": str(size), "SLURM_NTASKS": str(size), "SLURM_JOB_ID": "7104321"}
    common |= {"MASTER_PORT": str(free_port()), "SLURM_RESTART_COUNT": "1"}
    return [{**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(size)]


@contextlib.contextmanager
def started(task: str, out: Path, environments: list[dict[str, str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks with warnings as errors, ended whatever happens."""
    plain = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES and not name.startswith("SLURM_")}
    command = [sys.executable, "-W", "error", __file__, task, str(out)]
    ranks = [
        subprocess.Popen(command, env={**plain, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **own}, stderr=subprocess.PIPE, text=True)
        for own in environments
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def run_ranks(task: str, out: Path, environments: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Exit status and standard error of each."""
    with started(task, out, environments) as ranks:
        messages = [rank.communicate(timeout=TIMEOUT_S)[1] for rank in ranks]
        return [(rank.returncode, message) for rank, message in zip(ranks, messages, strict=True)]


if __name__ == "__main__":
    TASKS = {task.__name__: task for task in (compute, meet_die_and_meet, meet_and_lose_one)}
    TASKS[sys.argv[1]](Path(sys.argv[2]))
