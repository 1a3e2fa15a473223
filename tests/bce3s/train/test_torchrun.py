"""The launchers as people use them: torchrun on one node and on two, srun's environment, and what they do with kills and signals."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bce3s.checkpoint import CheckpointFolder
from bce3s.cli import main
from bce3s.distributed import interface
from bce3s.runlog import read_metrics
from tests.bce3s.ranks import ROOT, srun_environments, torchrun_environments
from tests.bce3s.train.runs import assert_equal_states, wait_until
from tests.commands import finish_together
from tests.object_store import free_port

TIMEOUT_S = 120
MakeCommand = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def command(make_shards: Any) -> MakeCommand:
    """A run of 30 short steps in three epochs that saves at every one it can."""
    root = make_shards(train=(60, 40, 35, 25), size=(16, 16), test=2).root

    def make(out: Path) -> list[str]:
        return [
            *("fast-train", "--dataset", "cifar10-lt", "--shards", str(root), "--recipe", "cifar10lt_resnet20_40ep", "--epochs", "3"),
            *("--batch-size", "16", "--precision", "fp32", "--device", "cpu", "--loader", "resident", "--checkpoint-every", "1steps"),
            *("--set", "data.num_threads=1", "--set", "data.image_size=16", "--set", "sync_batch_norm=true", "--out", str(out)),
        ]

    return make


# ---- starting them


@contextlib.contextmanager
def torchrun(options: list[str], arguments: list[str], output: Path, prefix: tuple[str, ...] = ()) -> Iterator[Any]:
    """torchrun with these options, its workers being `bce3s` with these arguments; ended with all of them whatever happens."""
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *options, "-m", "bce3s.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with output.open("a") as file:
        agent = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=output.parent)
    try:
        yield agent
    finally:
        for worker in workers_of(agent.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        agent.kill()
        agent.wait()


def workers_of(agent: int) -> dict[int, int]:
    """Process id -> rank of the workers that live."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        found = {}
        for child in map(int, children):
            with contextlib.suppress(OSError):
                variables = dict(pair.partition("=")[::2] for pair in Path(f"/proc/{child}/environ").read_text().split("\0"))
                if "RANK" in variables:
                    found[child] = int(variables["RANK"])
        return found
    return {}


def steps_saved(out: Path) -> int:
    newest = CheckpointFolder(out, keep=2).newest()
    return int(newest.stem.removeprefix("step-")) if newest else 0


def run_plain(environments: list[dict[str, str]], arguments: list[str], outputs: list[Path]) -> list[int | None]:
    """`bce3s` in processes of its own, each with an environment as a launcher makes it; their exit statuses."""
    places = [(environment, arguments, str(output)) for environment, output in zip(environments, outputs, strict=True)]
    return finish_together(_launched, places, TIMEOUT_S)


def _launched(environment: dict[str, str], arguments: list[str], output: str) -> None:
    os.environ |= environment
    warnings.simplefilter("error")
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(arguments)


ONE_NODE = ["--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def whole(command: MakeCommand, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two undisturbed ranks, which one of the slow tests finds equal to that of an undisturbed torchrun."""
    folder = tmp_path_factory.mktemp("whole")
    outputs = [folder / f"{rank}.txt" for rank in range(2)]
    assert run_plain(torchrun_environments(2), [*command(folder / "run"), "--resume"], outputs) == [0, 0], [o.read_text() for o in outputs]
    # Only the main rank talks.
    assert "on 2 ranks" in outputs[0].read_text()
    assert outputs[1].read_text() == ""
    return folder / "run"


# ---- one node


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_nothing_had_been(
    command: MakeCommand, whole: Path, tmp_path: Path, killed: int
) -> None:
    out, output = tmp_path / "run", tmp_path / "output.txt"
    with torchrun([*ONE_NODE, "--max-restarts", "2"], command(out), output) as agent:
        wait_until(lambda: steps_saved(out) % 10 > 2)
        os.kill(next(worker for worker, rank in workers_of(agent.pid).items() if rank == killed), signal.SIGKILL)
        assert agent.wait(TIMEOUT_S) == 0, output.read_text()
    said = output.read_text()
    assert "continuing after step" in said
    assert "Traceback" not in said
    assert_equal_states(whole, out)
    assert [line["epoch"] for line in read_metrics(out) if line["kind"] == "epoch"] == [0, 1, 2]


@pytest.mark.slow
def test_a_restart_does_not_continue_what_the_command_did_not_begin(command: MakeCommand, whole: Path, tmp_path: Path) -> None:
    """Refused beside an older run, it stays refused when torchrun tries again; told to overwrite, it overwrites, also after a death."""
    out, output = tmp_path / "run", tmp_path / "output.txt"
    shutil.copytree(whole, out)
    with torchrun([*ONE_NODE, "--max-restarts", "1"], command(out), output) as agent:
        assert agent.wait(TIMEOUT_S) != 0
    assert output.read_text().count("holds a run already") >= 2
    assert "continuing after" not in output.read_text()
    longer = [*command(out), "--epochs", "4", "--overwrite"]
    with torchrun([*ONE_NODE, "--max-restarts", "2"], longer, output) as agent:
        wait_until(lambda: len(workers_of(agent.pid)) == 2)
        os.kill(next(iter(workers_of(agent.pid))), signal.SIGKILL)  # before it has begun anything
        assert agent.wait(TIMEOUT_S) == 0, output.read_text()
    assert [line["epoch"] for line in read_metrics(out) if line["kind"] == "epoch"] == [0, 1, 2, 3]


@pytest.mark.slow
def test_torchrun_trains_what_two_plain_processes_train(command: MakeCommand, whole: Path, tmp_path: Path) -> None:
    with torchrun(ONE_NODE, command(tmp_path / "run"), tmp_path / "output.txt") as agent:
        assert agent.wait(TIMEOUT_S) == 0, (tmp_path / "output.txt").read_text()
    assert_equal_states(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["torchrun", "workers"])
def test_a_stop_signal_saves_the_run_for_the_next_launch(command: MakeCommand, whole: Path, tmp_path: Path, asked: str) -> None:
    out, output = tmp_path / "run", tmp_path / "output.txt"
    with torchrun(ONE_NODE, command(out), output) as agent:
        wait_until(lambda: steps_saved(out) > 11)
        for process in [agent.pid] if asked == "torchrun" else workers_of(agent.pid):
            os.kill(process, signal.SIGTERM)
        status = agent.wait(TIMEOUT_S)
    # torchrun itself reports the signal as an error; workers that ended well are none.
    assert (status == 0) == (asked == "workers"), output.read_text()
    said = " ".join(output.read_text().split())
    assert "stopped by SIGTERM after step" in said
    assert "and saved; the same launch with --resume continues there" in said
    assert 11 < steps_saved(out) < 30
    with torchrun(ONE_NODE, [*command(out), "--resume"], output) as agent:
        assert agent.wait(TIMEOUT_S) == 0, output.read_text()
    assert "continuing after step" in output.read_text()
    assert_equal_states(whole, out)


@pytest.mark.slow
def test_tasks_of_srun_train_what_ranks_of_torchrun_train(command: MakeCommand, whole: Path, tmp_path: Path) -> None:
    """SLURM counts this as the job's second start, which continues whatever is there: nothing."""
    outputs = [tmp_path / f"{rank}.txt" for rank in range(2)]
    statuses = run_plain(srun_environments(2), command(tmp_path / "run"), outputs)
    assert statuses == [0, 0], [output.read_text() for output in outputs]
    assert_equal_states(whole, tmp_path / "run")


# ---- two nodes


@contextlib.contextmanager
def two_nodes(arguments: list[str], folder: Path, host: str, *prefixes: tuple[str, ...], options: tuple[str, ...] = ()) -> Iterator[Any]:
    """Two agents with one worker each, which must end well."""
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", host, "--master-port", str(free_port()), *options]
    outputs = [folder / f"node-{node}.txt" for node in range(2)]
    with contextlib.ExitStack() as stack:
        agents = [
            stack.enter_context(
                torchrun([*meeting, "--node-rank", str(node)], arguments, outputs[node], prefixes[node] if prefixes else ())
            )
            for node in range(2)
        ]
        yield agents
        statuses = [agent.wait(TIMEOUT_S) for agent in agents]
    assert statuses == [0, 0], [output.read_text() for output in outputs]


@pytest.mark.slow
def test_two_nodes_train_what_one_with_two_workers_trains(command: MakeCommand, whole: Path, tmp_path: Path) -> None:
    with two_nodes(command(tmp_path / "run"), tmp_path, "127.0.0.1"):
        pass
    assert_equal_states(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_a_worker_killed_on_one_of_two_nodes_is_replaced(command: MakeCommand, whole: Path, tmp_path: Path, node: int) -> None:
    out = tmp_path / "run"
    with two_nodes(command(out), tmp_path, "127.0.0.1", options=("--max-restarts", "2")) as agents:
        wait_until(lambda: steps_saved(out) % 10 > 2)
        os.kill(*workers_of(agents[node].pid), signal.SIGKILL)
    assert "continuing after step" in (tmp_path / "node-0.txt").read_text()
    assert_equal_states(whole, out)


@pytest.fixture
def two_networks() -> Iterator[list[str]]:
    """Names of two network namespaces joined by a cable, 10.231.77.1 and .2: machines as far as the network is concerned."""
    names = [f"bce3s-{os.getpid()}-{node}" for node in range(2)]
    cable = [f"b3s{os.getpid() % 100000}{end}" for end in "ab"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
            for node, (name, end) in enumerate(zip(names, cable, strict=True)):
                ip("link", "set", end, "netns", name)
                for arguments in (["addr", "add", f"10.231.77.{node + 1}/24", "dev", end], ["link", "set", end, "up"]):
                    ip("-n", name, *arguments)
                ip("-n", name, "link", "set", "lo", "up")
        except FileNotFoundError:
            pytest.skip("two networks need the command ip (iproute2)")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot make two networks here: {error.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_nodes_on_networks_of_their_own(command: MakeCommand, whole: Path, tmp_path: Path, two_networks: list[str]) -> None:
    prefixes = [("ip", "netns", "exec", name) for name in two_networks]
    with two_nodes(command(tmp_path / "run"), tmp_path, "10.231.77.1", *prefixes):
        pass
    assert_equal_states(whole, tmp_path / "run")


# ---- what is said of a broken start


def test_gloo_is_led_to_the_interface_of_a_host_and_left_alone_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert interface._interface_to("127.0.0.1") == "lo"
    assert interface._interface_to("no-such-host.invalid") is None
    interface.choose_interface("127.0.0.1")
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ({"WORLD_SIZE": ""}, "error: WORLD_SIZE is not set; start the ranks with torchrun or srun, which set that"),
        ({"MASTER_ADDR": ""}, "error: MASTER_ADDR is not set; start the ranks with torchrun or srun, which set that"),
        ({"WORLD_SIZE": "1"}, "error: there is no rank 1"),
    ],
)
def test_a_broken_environment_is_a_sentence(command: MakeCommand, tmp_path: Path, broken: dict[str, str], sentence: str) -> None:
    environments = [{**each, **broken} for each in torchrun_environments(2)][-1:]
    (status,) = run_plain(environments, command(tmp_path / "run"), [tmp_path / "1.txt"])
    said = (tmp_path / "1.txt").read_text()
    assert status == 2
    assert said.startswith(sentence)
    assert said.count("\n") == 1


def test_what_all_ranks_refuse_each_says_in_a_sentence(command: MakeCommand, tmp_path: Path) -> None:
    outputs = [tmp_path / f"{rank}.txt" for rank in range(2)]
    assert run_plain(torchrun_environments(2), [*command(tmp_path / "run"), "--batch-size", "15"], outputs) == [2, 2]
    for output in outputs:
        assert output.read_text() == "error: batch_size 15 cannot be shared by 2 ranks: choose a multiple of 2\n"
