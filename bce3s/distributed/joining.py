"""How a process finds the other ranks: from the environment that torchrun or SLURM's srun gives it."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from bce3s.distributed.interface import choose_interface
from bce3s.distributed.meeting import RETRY_S, agree_on_start
from bce3s.distributed.world import World
from pipelines.types import BackendError, ConfigError

JOIN_TIMEOUT_S = 300.0
"""How long a rank waits for the others to start."""

# Rank 0 writes its last checkpoint while the others wait in a collective. A peer that dies is noticed at once by gloo; under NCCL, whose
# kernels wait on the device, it may take this long.
_COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_LAUNCHERS = "start the ranks with torchrun or srun, which set that"


@dataclass(frozen=True)
class _Seat:
    """Where the launcher put this process, and where rank 0 listens."""

    world: World
    host: str
    port: int


def is_launched() -> bool:
    """Whether torchrun, or srun with more than one task, started this process as one of several."""
    return _by_torchrun() or _by_srun()


def join_world(device_name: str, *, timeout_s: float = JOIN_TIMEOUT_S) -> World:
    """Meets the other ranks and opens the process group, which `leave_world` closes; a single rank needs none.

    Under CUDA the group is NCCL's and the current device becomes cuda:LOCAL_RANK, on a CPU it is gloo's.

    Args:
        device_name: "auto" (CUDA where there is one), "cpu" or "cuda".
        timeout_s: how long to wait for the others, in seconds.

    Raises:
        ConfigError: the environment is incomplete, rank 0 cannot be reached, or ranks are missing.
        BackendError: more ranks on this machine than GPUs, or a torch without that backend.
    """
    assert not (dist.is_available() and dist.is_initialized()), "join once, leave before joining again"
    seat = _seat_of_torchrun() if _by_torchrun() else _seat_of_srun()
    world = seat.world
    if not 0 <= world.rank < world.size or world.local_rank < 0:
        raise ConfigError(f"there is no rank {world.rank} (on its machine {world.local_rank}) of {world.size}; {_LAUNCHERS}")
    if world.size == 1:
        return world
    if not 0 < seat.port < 1 << 16:
        raise ConfigError(f"MASTER_PORT must lie in 1 to 65535, not {seat.port}")
    device = _own_device(device_name, world)
    timeout = timedelta(seconds=timeout_s)
    if not world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _await_main(seat, timeout_s)
    host = f"[{seat.host}]" if ":" in seat.host else seat.host
    try:
        store, _, _ = next(dist.rendezvous(f"tcp://{host}:{seat.port}", world.rank, world.size, timeout=timeout))
        start = agree_on_start(store, world, timeout_s)
        store.set_timeout(_COLLECTIVE_TIMEOUT)
        choose_interface(seat.host)
        backend = "nccl" if device else "gloo"
        store = dist.PrefixStore(start.name, store)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=_COLLECTIVE_TIMEOUT, device_id=device)
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise _join_error(error, seat, timeout_s) from error
    return replace(world, restart=start.restart, job=start.job)


def leave_world() -> None:
    """Closes the process group and what was opened beside it, at a good end; nothing where there is none.

    After an error it must not be called under NCCL, nor at exit: closing waits for the peers, which may wait for this rank.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_abandoned_on_error() -> bool:
    """Whether `abandon_world` would end this process."""
    return bool(dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl")


def abandon_world(status: int) -> None:
    """Ends this process at once where it is one of several ranks under NCCL, so that the others hear of its error; else returns."""
    if is_abandoned_on_error():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# ---- the launchers


def _by_torchrun() -> bool:
    return any(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def _by_srun() -> bool:
    # Of the step, not of the job: SLURM_NTASKS is also set in a batch script that runs Python once, without srun.
    return "SLURM_PROCID" in os.environ and _number("SLURM_STEP_NUM_TASKS", 1) > 1


def _seat_of_torchrun() -> _Seat:
    size = _number("WORLD_SIZE")
    world = World(_number("RANK"), size, _number("LOCAL_RANK", 0 if size == 1 else None), _restart())
    if size == 1:
        return _Seat(world, "", 0)
    if not os.environ.get("MASTER_ADDR"):
        raise ConfigError(f"MASTER_ADDR is not set; {_LAUNCHERS}")
    return _Seat(world, os.environ["MASTER_ADDR"], _number("MASTER_PORT"))


def _seat_of_srun() -> _Seat:
    if not _by_srun():
        return _Seat(World(), "", 0)
    world = World(_number("SLURM_PROCID"), _number("SLURM_STEP_NUM_TASKS"), _number("SLURM_LOCALID"), _restart(), _slurm_job())
    nodes = next((os.environ[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if os.environ.get(name)), "")
    host = os.environ.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise ConfigError("SLURM names no nodes (SLURM_STEP_NODELIST); set MASTER_ADDR to the host of rank 0")
    # By the job's last digits, as Lightning chooses it, so that two jobs on one node do not meet.
    port = _number("MASTER_PORT", 15000 + _number("SLURM_JOB_ID", 0) % 10000)
    return _Seat(world, host, port)


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `node[03-05,7],other` is node03; empty of an empty list."""
    return re.sub(r"\[([^\]\-,]*)[^\]]*\]", r"\1", nodes).split(",")[0]


def _restart() -> int:
    return _number("TORCHELASTIC_RESTART_COUNT", 0) + _number("SLURM_RESTART_COUNT", 0)


def _slurm_job() -> str:
    # A job that SLURM requeues keeps its number.
    return f"slurm-{os.environ['SLURM_JOB_ID']}" if os.environ.get("SLURM_JOB_ID") else ""


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise ConfigError(f"{name} is '{text}' and must be a whole number; {_LAUNCHERS}" if text else f"{name} is not set; {_LAUNCHERS}")
    return int(text)


# ---- the device and the meeting


def _own_device(device_name: str, world: World) -> torch.device | None:
    """The GPU of this rank, made the current one; None on a CPU."""
    if not dist.is_available():
        raise BackendError(f"torch {torch.__version__} was built without torch.distributed; install another build, or run one process")
    if device_name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"{world.size} ranks cannot share device '{device_name}'; take --device cuda, and each has its own, or cpu")
    if device_name == "cpu" or (device_name == "auto" and not torch.cuda.is_available()):
        return None
    num_gpus = torch.cuda.device_count()
    if world.local_rank >= num_gpus:
        raise BackendError(
            f"rank {world.rank} is number {world.local_rank + 1} on {socket.gethostname()}, but torch sees only {num_gpus} GPUs there; "
            "start as many ranks as GPUs (torchrun --nproc-per-node), let srun show all GPUs to every task, or take --device cpu"
        )
    if not dist.is_nccl_available():
        raise BackendError(f"torch {torch.__version__} was built without NCCL; install a CUDA build for Linux, or take --device cpu")
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def _await_main(seat: _Seat, timeout_s: float) -> None:
    """Until rank 0 listens: torch's own wait would end in a page of C++ frames."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((seat.host, seat.port), timeout=timeout_s).close()
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise ConfigError(
                    f"rank {seat.world.rank} found no rank 0 at {seat.host}:{seat.port} within {timeout_s:g} s "
                    f"({error.strerror or error}); see whether it runs there, or set MASTER_ADDR and MASTER_PORT"
                ) from error
            time.sleep(RETRY_S)
        else:
            return


def _join_error(error: Exception, seat: _Seat, timeout_s: float) -> ConfigError | BackendError:
    world, reason = seat.world, str(error).strip().split("\n")[0]
    if "EADDRINUSE" in reason:
        return ConfigError(f"port {seat.port} of {seat.host} is taken; set another MASTER_PORT (torchrun --master-port) for all ranks")
    if isinstance(error, TimeoutError | dist.DistNetworkError | dist.DistStoreError):
        return ConfigError(
            f"rank {world.rank} did not find all {world.size} ranks at {seat.host}:{seat.port} within {timeout_s:g} s ({reason}); "
            "see whether the others started"
        )
    return BackendError(f"rank {world.rank} cannot talk to the others ({reason}); NCCL_DEBUG=INFO or GLOO_SOCKET_IFNAME may help")
