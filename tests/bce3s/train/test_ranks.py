"""Several ranks train what one process trains: each rank is a real process, and they talk through gloo."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bce3s.checkpoint import load_checkpoint
from bce3s.config import TrainConfig
from bce3s.distributed import World, join_world, leave_world
from bce3s.progress import Standing, TrainingProgress
from bce3s.train import StoppedError, Trainer, newest_checkpoint
from pipelines.format import open_shards
from pipelines.types import UserError
from tests.bce3s.train.runs import CONFIG, CPU, _StopAt, assert_equal_states, console
from tests.commands import finish_together
from tests.object_store import free_port

TIMEOUT_S = 120
# 64 classes, of which the source view's joint term sees 25: a batch of 16 leaves at least nine to be drawn, so a rank that drew by itself
# or knew only its own labels would show. 160 images are ten steps an epoch, the first of which only fills the feature memory.
COUNTS = (20, 9, 7, *[4] * 9, *[2] * 36, *[1] * 16)
NUM_STEPS = 20
OWN = replace(
    CONFIG,
    epochs=2,
    eval_every=2,
    data=replace(CONFIG.data, image_size=16),
    # Rounding grows from step to step, the faster the faster the weights move.
    optimizer=replace(CONFIG.optimizer, learning_rate=0.001),
    ema_decay=0.9,
)
SYNCED = replace(OWN, sync_batch_norm=True, ema_decay=0.0)
MICRO = replace(SYNCED, accumulate_steps=2)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What all ranks of a world do with one run folder."""

    name: str
    run: str
    config: TrainConfig
    resume: bool = False
    stop_after: int | None = None  # steps; then the last rank, and no other, is asked to stop
    frozen_norms: bool = False  # batch-norm by its running statistics, so that a micro-batch is computed as in the whole batch
    unlike_weights: bool = False  # on the last rank, which `unlike_rate` or `unlike_shards` gives settings or data of its own
    unlike_rate: float = 0.0
    unlike_shards: Path | None = None
    evaluate: Path | None = None  # the weights of this run, instead of training


Found = dict[str, list[dict[str, Any]]]  # by trial, of each rank


# ---- what a rank runs


def run_rank(rank: int, size: int, port: int, root: Path, runs: Path, trials: list[Trial]) -> None:
    warnings.simplefilter("error")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = join_world("cpu", timeout_s=TIMEOUT_S)
    torch.save({trial.name: carry_out(trial, root, runs, world) for trial in trials}, runs / f"{rank}.pt")
    leave_world()


def carry_out(trial: Trial, root: Path, runs: Path, world: World) -> dict[str, Any]:
    """What this rank has at the end of the trial, or the sentence that it ended with."""
    config = trial.config
    if world.rank == world.size - 1:
        root = trial.unlike_shards or root
        config = replace(config, optimizer=replace(config.optimizer, learning_rate=trial.unlike_rate or config.optimizer.learning_rate))
    try:
        trainer = Trainer(config, open_shards(root), runs / trial.run, console(), world)
        try:
            return evaluated(trainer, trial.evaluate) if trial.evaluate else trained(trainer, trial)
        finally:
            trainer.close()
    except UserError as error:
        return {"sentence": str(error)}


def trained(trainer: Trainer, trial: Trial) -> dict[str, Any]:
    steps, is_last = terms_of_steps(trainer), trainer.world.rank == trainer.world.size - 1
    if is_last and trial.stop_after is not None:
        trainer._stop = _StopAt(lambda: trainer.state.cursor.global_step >= (trial.stop_after or 0))
    if trial.frozen_norms:
        trainer.model.train = lambda mode=True: nn.Module.train(trainer.model, False)  # type: ignore[method-assign]
    if is_last and trial.unlike_weights:
        with torch.no_grad():
            trainer.model.classifier.weight[3, 5] += 1e-6
    if trial.resume:
        trainer.resume()
    try:
        trainer.fit()
        stopped_at = None
    except StoppedError as stopped:
        stopped_at = stopped.cursor.global_step
    found = {"steps": steps, "model": dict(trainer.model.state_dict()), "stopped_at": stopped_at}
    average = trainer.step.average
    return found if average is None else {**found, "average": dict(average.state_dict()["averages"]), "evaluated": averages(trainer)}


def averages(trainer: Trainer) -> dict[str, Tensor]:
    """The averaged network as this rank evaluates and saves it."""
    with trainer.state.rank_average(), trainer.step.average.applied():  # type: ignore[union-attr]
        return {name: value.clone() for name, value in trainer.model.state_dict().items() if "running" in name}


def terms_of_steps(trainer: Trainer) -> list[dict[str, float]]:
    """The terms of the whole batch, of every step that the trainer will make."""
    steps: list[dict[str, float]] = []
    add = trainer.state.means.add

    def observed(terms: dict[str, Tensor], step: int) -> None:
        steps.append({name: float(trainer.world.mean(value.clone())) for name, value in terms.items()})
        add(terms, step)

    trainer.state.means.add = observed  # type: ignore[method-assign]
    return steps


def evaluated(trainer: Trainer, run: Path) -> dict[str, Any]:
    trainer.model.load_state_dict(load_checkpoint(newest_checkpoint(run), CPU)["model"])
    with TrainingProgress(console(), Standing()) as progress:
        figures = trainer._evaluate("test", progress, flip_tta=True)
    return {name: (accuracy.num_images, accuracy.all, accuracy.per_class) for name, accuracy in figures.items()}


# ---- starting them


def run_together(size: int, root: Path, runs: Path, *trials: Trial) -> Found:
    """What the ranks of a world found, one trial after the other."""
    port = free_port()
    places = [(rank, size, port, root, runs, list(trials)) for rank in range(size)]
    assert finish_together(run_rank, places, TIMEOUT_S) == [0] * size
    found = [torch.load(runs / f"{rank}.pt", weights_only=True) for rank in range(size)]
    return {trial.name: [each[trial.name] for each in found] for trial in trials}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def root(make_shards: Any) -> Path:
    path: Path = make_shards(train=COUNTS, size=(16, 16), test=3).root
    return path


@pytest.fixture(scope="module")
def alone(root: Path, runs: Path) -> Found:
    return run_together(
        *(1, root, runs),
        Trial(name="synced", run="alone", config=SYNCED),
        Trial(name="frozen", run="alone-frozen", config=SYNCED, frozen_norms=True),
        Trial(name="evaluated", run="alone", config=SYNCED, evaluate=runs / "alone"),
    )


@pytest.fixture(scope="module")
def by_two(make_shards: Any, root: Path, runs: Path, alone: Found) -> Found:
    other_shards = make_shards(train=(*COUNTS[1:], COUNTS[0]), size=(16, 16), test=3).root
    return run_together(
        *(2, root, runs),
        Trial(name="synced", run="two", config=SYNCED),
        Trial(name="evaluated", run="two", config=SYNCED, evaluate=runs / "alone"),
        Trial(name="micro", run="two-micro", config=MICRO, frozen_norms=True),
        Trial(name="synced-begun", run="two-stopped", config=SYNCED, stop_after=7),
        Trial(name="own", run="two-own", config=OWN),
        Trial(name="own-begun", run="two-own-stopped", config=OWN, stop_after=13),
        Trial(name="own-continued", run="two-own-stopped", config=OWN, resume=True),
        Trial(name="unlike-weights", run="two-unlike", config=OWN, unlike_weights=True),
        Trial(name="unlike-settings", run="two-unlike", config=OWN, unlike_rate=0.002),
        Trial(name="unlike-shards", run="two-unlike", config=OWN, unlike_shards=other_shards),
        Trial(name="odd", run="two-odd", config=replace(OWN, data=replace(OWN.data, batch_size=15))),
        Trial(name="odd-micro", run="two-odd", config=replace(OWN, accumulate_steps=16)),
    )


@pytest.fixture(scope="module")
def by_four(root: Path, runs: Path, alone: Found) -> Found:
    return run_together(
        *(4, root, runs),
        Trial(name="synced", run="four", config=SYNCED),
        Trial(name="evaluated", run="four", config=SYNCED, evaluate=runs / "alone"),
    )


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request: pytest.FixtureRequest) -> Found:
    found: Found = request.getfixturevalue("by_two" if request.param == 2 else "by_four")
    return found


# ---- the same batch on one, two and four ranks


def assert_same_curve(steps: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    """Every term of every step. Sums in another order differ by 1e-7; 20 steps made up to 7e-4 of that when this was written."""
    assert len(steps) == len(wanted)
    for number, (found, expected) in enumerate(zip(steps, wanted, strict=True), NUM_STEPS - len(steps)):
        assert found == pytest.approx(expected, rel=1e-5 if number < 5 else 3e-3), f"step {number}"
        assert found["class_subset_size"] == expected["class_subset_size"] == 25.0
        assert ("contrastive" in found) == (number >= 10)


def assert_equal_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, value in found.items() if not torch.equal(value, wanted[name])] == []


def assert_same_memory(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Each class holds the projection of the same sample: those of two samples differ by their length, these by rounding of 20 steps."""
    assert torch.equal(found["feature_memory.filled_K"], wanted["feature_memory.filled_K"])
    rows_KP, wanted_KP = found["feature_memory.rows_KP"], wanted["feature_memory.rows_KP"]
    assert ((rows_KP - wanted_KP).norm(dim=1) < 0.1 * wanted_KP.norm(dim=1)).all()


def test_any_number_of_ranks_trains_the_curve_of_one(alone: Found, together: Found) -> None:
    assert len(alone["synced"][0]["steps"]) == NUM_STEPS
    for rank in together["synced"]:
        assert_same_curve(rank["steps"], alone["synced"][0]["steps"])
        assert_same_memory(rank["model"], alone["synced"][0]["model"])
        assert_equal_tensors(rank["model"], together["synced"][0]["model"])


def test_any_number_of_ranks_counts_exactly_what_one_counts(alone: Found, together: Found) -> None:
    """The same weights, on a test set whose last batch the ranks share unevenly."""
    assert alone["evaluated"][0]["plain"][0] == 3 * len(COUNTS)
    assert together["evaluated"] == alone["evaluated"] * len(together["evaluated"])


def test_micro_batches_on_two_ranks_give_the_step_of_the_whole_batch(alone: Found, by_two: Found) -> None:
    for rank in by_two["micro"]:
        assert_same_curve(rank["steps"], alone["frozen"][0]["steps"])
        assert_same_memory(rank["model"], alone["frozen"][0]["model"])
        assert_equal_tensors(rank["model"], by_two["micro"][0]["model"])


# ---- batch-norm of each rank's own


def test_ranks_with_batch_statistics_of_their_own_keep_equal_weights(by_two: Found) -> None:
    one, other = (rank["model"] for rank in by_two["own"])
    unlike = {name for name in one if not torch.equal(one[name], other[name])}
    assert unlike == {name for name in one if name.endswith(("running_mean", "running_var"))}


def test_all_ranks_evaluate_one_average_of_the_weights(by_two: Found) -> None:
    """Though each keeps an average of its own batch statistics."""
    one, other = by_two["own"]
    assert any(not torch.equal(one["average"][name], other["average"][name]) for name in one["average"])
    assert_equal_tensors(one["evaluated"], other["evaluated"])


def test_a_stopped_run_continues_on_as_many_ranks_bit_for_bit(by_two: Found, runs: Path) -> None:
    """The last rank alone was asked to stop; each rank had batch-norm statistics of its own, in the average of its weights too."""
    begun, continued = by_two["own-begun"], by_two["own-continued"]
    assert [rank["stopped_at"] for rank in begun] in ([13, 13], [14, 14])
    for rank, whole in enumerate(by_two["own"]):
        assert begun[rank]["steps"] + continued[rank]["steps"] == whole["steps"]
        assert_equal_tensors(continued[rank]["model"], whole["model"])
        assert_equal_tensors(continued[rank]["average"], whole["average"])
    assert_equal_states(runs / "two-own", runs / "two-own-stopped")


def test_a_run_of_two_ranks_continues_on_one(root: Path, runs: Path, alone: Found, by_two: Found) -> None:
    (continued,) = run_together(1, root, runs, Trial(name="continued", run="two-stopped", config=SYNCED, resume=True))["continued"]
    assert 12 <= len(continued["steps"]) <= 13
    assert_same_curve(continued["steps"], alone["synced"][0]["steps"][-len(continued["steps"]) :])
    assert_same_memory(continued["model"], alone["synced"][0]["model"])


# ---- what is refused


def test_ranks_that_do_not_start_alike_are_refused(by_two: Found) -> None:
    for rank in range(2):
        assert by_two["unlike-weights"][rank]["sentence"].startswith("the ranks start from different weights; give every node")
        assert by_two["unlike-settings"][rank]["sentence"].startswith("the ranks were started with different settings; give every node")
        assert by_two["unlike-shards"][rank]["sentence"].startswith("the ranks read different shards (their manifests differ); give")


def test_a_batch_that_ranks_cannot_share_is_a_sentence(by_two: Found) -> None:
    for rank in range(2):
        assert by_two["odd"][rank]["sentence"] == "batch_size 15 cannot be shared by 2 ranks: choose a multiple of 2"
        assert by_two["odd-micro"][rank]["sentence"].startswith("batch_size 16 cannot be shared by 2 ranks in 16 micro-batches: choose a")
