"""Ranks as real processes that talk through gloo: what they compute together, and what is said when one is missing or dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bce3s.distributed import (
    ALONE,
    World,
    is_launched,
    is_lost_rank,
    join_world,
    leave_world,
    load_running_statistics,
    running_statistics,
    synced_batch_norm,
)
from bce3s.distributed.joining import first_host
from bce3s.distributed.meeting import agree_on_start
from pipelines.types import BackendError, ConfigError
from tests.bce3s import ranks
from tests.bce3s.ranks import (
    LAUNCH_VARIABLES,
    ROOT,
    TIMEOUT_S,
    half_precision_in,
    network,
    run_ranks,
    srun_environments,
    torchrun_environments,
    train_in,
    whole_batch,
)
from tests.object_store import free_port


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What three ranks of torchrun computed; they said nothing and ended well."""
    out = tmp_path_factory.mktemp("ranks")
    assert run_ranks("compute", out, torchrun_environments(3)) == [(0, "")] * 3
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(3)]


# ---- together


def test_ranks_gather_sum_and_agree(together: list[dict[str, Any]]) -> None:
    assert [each["world"] for each in together] == [(rank, 3, rank, 2, rank == 0) for rank in range(3)]
    for each in together:
        for rows in each["rows"].values():
            torch.testing.assert_close(rows, torch.tensor([0, 0, 1, 1, 2, 2]).to(rows.dtype)[:, None, None].expand(6, 1, 3))
        assert each["strided"].tolist() == [[0, 0], [0, 0], [2, 2], [2, 2], [4, 4], [4, 4]]
        assert not each["strided"].requires_grad
        assert each["sum"].tolist() == [3.0, 3.0]
        assert each["mean"].tolist() == [1.0, 1.0]
        assert each["counts"].tolist() == [3 * 2**40 + 3]
        assert each["agreed"] == [(False, False), (False, False), (True, False), (False, False)]
        assert each["settled"] == ((False, False), None, (False, False), None)
        assert torch.equal(each["running"], together[0]["running"])
    # One batch-norm saw the batch, one saw it doubled, one tripled: the running means are the mean of theirs.
    alone = nn.BatchNorm2d(3)
    alone(whole_batch()[:, :1].expand(-1, 3, -1, -1) * 2)
    torch.testing.assert_close(together[0]["running"][:3], alone.running_mean)


@pytest.mark.parametrize(("precision", "tolerance"), [("trained", 1e-6), ("trained_double", 1e-12)])
def test_synced_batch_norm_is_that_of_the_whole_batch(together: list[dict[str, Any]], precision: str, tolerance: float) -> None:
    """Values, input gradients, running statistics (unbiased) and the summed parameter gradients, for unequal shares."""
    dtype = torch.float64 if precision == "trained_double" else torch.float32
    alone = train_in(ALONE, dtype)

    def assert_close(found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))

    for name in ("output", "input_gradient", "evaluated"):
        assert_close(torch.cat([each[precision][name] for each in together]), alone[name])
    for each in together:
        # As one vector: single ones are small differences of large sums, in one process as well.
        assert_close(*(torch.cat([g.flatten() for g in run["parameter_gradients"]]) for run in (each[precision], alone)))
        for name, wanted in alone["buffers"].items():
            assert_close(each[precision]["buffers"][name], wanted)
            assert torch.equal(each[precision]["buffers"][name], together[0][precision]["buffers"][name])


def test_synced_batch_norm_under_autocast(together: list[dict[str, Any]]) -> None:
    output = torch.cat([each["half"] for each in together])
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, half_precision_in(ALONE), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_meet_again(tmp_path: Path) -> None:
    """Twice: its store still holds what the ranks before wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "--max-restarts", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, ranks.__file__, "meet_die_and_meet", str(tmp_path)], env=environment, timeout=2 * TIMEOUT_S, check=True)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)]
    (job,) = {text.split("job='")[1].rstrip("')") for text in said}
    assert len(job) == 16
    assert said == [repr(World(rank, 3, rank, 2, job)) for rank in range(3)]


def test_a_start_takes_nothing_from_the_start_before() -> None:
    """In one store, as torchrun keeps it: each has its own name and number, which all its ranks know, in whatever order they come."""
    store, starts = torch.distributed.HashStore(), []
    for number, size in enumerate((3, 3, 2, 3)):
        with ThreadPoolExecutor(size) as pool:
            waiting = []
            for rank in range(size):
                waiting.append(pool.submit(agree_on_start, store, World((rank + number) % size, size), 10.0))
                time.sleep(0.03)
            agreed = {each.result() for each in waiting}
        assert len(agreed) == 1
        starts.extend(agreed)
    assert len({start.name for start in starts}) == 4
    assert [start.restart for start in starts] == [0, 1, 2, 3]


def test_the_restarts_of_any_machine_are_those_of_all() -> None:
    """The store is new where the machine that kept it was replaced, and torchrun counts on the others only what they began themselves."""
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(agree_on_start, store, World(rank, 3, restart=(0, 4, 1)[rank]), 10.0) for rank in range(3)]
        assert [each.result().restart for each in waiting] == [4, 4, 4]


def test_who_did_not_come_is_named() -> None:
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(2) as pool:
        main, other = (pool.submit(agree_on_start, store, World(rank, 4), 0.3) for rank in (0, 2))
    with pytest.raises(TimeoutError, match="missing: 1, 2, 3"):
        main.result()
    with pytest.raises(TimeoutError, match="rank 0 did not come, or waits for another"):
        other.result()


def test_ranks_of_srun_meet_and_the_death_of_one_is_a_sentence_of_the_other(tmp_path: Path) -> None:
    started_s = time.monotonic()
    (status, message), (died, _) = run_ranks("meet_and_lose_one", tmp_path, srun_environments(2))
    assert (status, died) == (0, 9), message
    found = torch.load(tmp_path / "0.pt", weights_only=True)
    assert found["world"] == repr(World(0, 2, 0, restart=1, job="slurm-7104321"))
    assert len(found["sentences"]) == 4
    for sentence in found["sentences"]:
        assert sentence.startswith("another rank ended or does not answer (")
        assert sentence.endswith("then start all ranks again with --resume")
        assert "\n" not in sentence
    assert time.monotonic() - started_s < TIMEOUT_S / 2


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (
            RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"),
            True,
        ),
        (torch.distributed.DistBackendError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"), True),
        (torch.distributed.DistNetworkError("x"), True),
        (torch.distributed.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("Connection closed by peer"), False),
    ],
    ids=str,
)
def test_lost_ranks_are_told_from_other_errors(error: Exception, lost: bool) -> None:
    assert is_lost_rank(error) is lost
    with pytest.raises(ValueError, match="wrapped") as caught:
        raise ValueError("wrapped") from error
    assert is_lost_rank(caught.value) is lost


# ---- alone, and what is said of a broken start


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCH_VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_alone_everything_is_itself() -> None:
    assert not is_launched()
    assert join_world("cpu") == ALONE == World()
    assert not torch.distributed.is_initialized()
    leave_world()
    rows = torch.ones(2, 3)
    assert ALONE.is_main
    assert ALONE.sum(rows) is rows
    assert ALONE.mean(rows) is rows
    assert torch.equal(ALONE.gather_rows(rows), rows)
    agreement = ALONE.agreement()
    assert agreement.exchange(True, False) == (True, False)
    agreement.settle()
    model = network()
    assert synced_batch_norm(model, ALONE) is model
    assert type(model[3]) is nn.BatchNorm2d  # type: ignore[index]


def test_a_single_rank_of_torchrun_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", TORCHELASTIC_RESTART_COUNT="3")
    assert is_launched()
    assert join_world("auto") == World(restart=3)
    assert not torch.distributed.is_initialized()


def test_a_batch_script_that_runs_python_once_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch sets the job's task count and a task number in the script, too; only a step has several tasks."""
    set_all(monkeypatch, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="8", SLURM_JOB_ID="12")
    assert not is_launched()
    assert join_world("cpu") == ALONE
    set_all(monkeypatch, SLURM_STEP_NUM_TASKS="8")
    assert is_launched()


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node[03-05,7]", "node03"),
        ("gpu1", "gpu1"),
        ("a1,b[2-3]", "a1"),
        ("r[2,4]n[10-12],x", "r2n10"),
        ("login-1,login-2", "login-1"),
        ("", ""),
    ],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "5"}


@pytest.mark.parametrize(
    ("variables", "device", "sentence"),
    [
        ({**TORCHRUN, "MASTER_ADDR": ""}, "cpu", "MASTER_ADDR is not set; start the ranks with torchrun or srun"),
        ({**TORCHRUN, "LOCAL_RANK": ""}, "cpu", "LOCAL_RANK is not set"),
        ({"RANK": "0"}, "cpu", "WORLD_SIZE is not set"),
        ({**TORCHRUN, "MASTER_PORT": "x"}, "cpu", "MASTER_PORT is 'x' and must be a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "cpu", "must lie in 1 to 65535"),
        ({**TORCHRUN, "RANK": "2"}, "cpu", "there is no rank 2"),
        (TORCHRUN, "cuda:1", "2 ranks cannot share device 'cuda:1'"),
        (SRUN, "cpu", "SLURM names no nodes"),
        (TORCHRUN, "cpu", r"found no rank 0 at 127.0.0.1:1 within 0.3 s \(Connection refused\)"),
        ({**SRUN, "SLURM_STEP_NODELIST": "no-such-host.invalid"}, "cpu", r"found no rank 0 at no-such-host.invalid:15005 within 0.3 s"),
    ],
)
def test_a_broken_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], device: str, sentence: str) -> None:
    set_all(monkeypatch, **variables)
    with pytest.raises(ConfigError, match=sentence) as caught:
        join_world(device, timeout_s=0.3)
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()


def test_more_ranks_than_gpus_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, **{**TORCHRUN, "RANK": "99", "WORLD_SIZE": "100", "LOCAL_RANK": "99"})
    with pytest.raises(BackendError, match=r"rank 99 is number 100 on \S+, but torch sees only \d+ GPUs there"):
        join_world("cuda")


def test_a_missing_rank_and_a_taken_port_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, **{**TORCHRUN, "RANK": "0", "MASTER_PORT": str(free_port())})
    with pytest.raises(ConfigError, match=r"rank 0 did not find all 2 ranks at 127.0.0.1:\d+ within 1 s \(.*1/2 clients joined"):
        join_world("cpu", timeout_s=1)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ConfigError, match=r"port \d+ of 127.0.0.1 is taken; set another MASTER_PORT"):
            join_world("cpu", timeout_s=1)


def test_running_statistics_are_a_copy_that_loads_back() -> None:
    model = network()
    model(whole_batch())
    kept = running_statistics(model)
    assert kept.shape == (2 * 3 + 2 * 4,)
    model(whole_batch() * 5)
    assert not torch.equal(running_statistics(model), kept)
    load_running_statistics(model, kept)
    assert torch.equal(running_statistics(model), kept)
    assert int(model[3].num_batches_tracked) == 2  # type: ignore[index, arg-type]
    assert running_statistics(nn.Linear(2, 2)).shape == (0,)
