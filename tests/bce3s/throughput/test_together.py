"""Loader and step together: coupling, what is left behind, and ranges that change nothing."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bce3s.config import LossConfig, ModelConfig, TrainConfig
from bce3s.graph import fixed_copy
from bce3s.throughput.step_parts import PARTS, forward_flops, part_rows
from bce3s.throughput.timing import Budget, sample, sample_in_turns
from bce3s.throughput.together import DiscardingReader, Together, contention_probe, loader_probe, step_probe
from bce3s.throughput.trace import DATA_WAIT, STEP_RANGES, put_ranges, write_trace
from bce3s.throughput.workload import EndlessBatches, Workload
from pipelines.config import AugmentConfig, DataConfig
from pipelines.types import Batch, ConfigError, ShardError

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    dataset="cifar10-lt",
    device="cpu",
    precision="fp32",
    data=DataConfig(loader="resident", batch_size=4, image_size=32, num_threads=1, augment=AugmentConfig(crop="pad", eval_crop=1.0)),
    model=ModelConfig(arch="resnet20-cifar", projection_dim=16),
)
QUICK = Budget(repeats=5, seconds=0.005)


@pytest.fixture(scope="module")
def workload(make_shards: Any) -> Workload:
    return Workload(CONFIG, make_shards())


class SlowLoader:
    """A loader whose every batch takes `batch_s`; notes in which thread it was asked."""

    num_steps = 3

    def __init__(self, batch: Batch, batch_s: float) -> None:
        self.batch, self.batch_s, self.threads, self.epochs = batch, batch_s, [], []

    def epoch(self, epoch: int, start_step: int = 0) -> Any:
        self.epochs.append(epoch)
        for _ in range(self.num_steps):
            self.threads.append(threading.current_thread().name)
            time.sleep(self.batch_s)
            yield self.batch


def first_batch(workload: Workload) -> Batch:
    loader = workload.loader()
    try:
        return fixed_copy(next(EndlessBatches(loader, workload.first_epoch)))
    finally:
        loader.close()


def test_the_measured_order_is_that_of_the_run(workload: Workload) -> None:
    """Plans, and through them the decode rows, and the loader agree on every id; all terms of the loss take part."""
    loader = workload.loader()
    batches = EndlessBatches(loader, workload.first_epoch)
    plans = workload.plans()
    for _ in range(2 * loader.num_steps + 1):
        batch, plan = next(batches), next(plans)
        assert (batch.epoch, batch.step, batch.ids_S.tolist()) == (plan.epoch, plan.step, plan.ids_S.tolist())
    loader.close()
    assert batch.epoch == workload.first_epoch + 2
    assert workload.first_epoch == CONFIG.loss.contrastive_warmup_epochs == 1


def test_end_to_end_starts_without_what_was_decoded_ahead(workload: Workload) -> None:
    """Batches that waited while others were measured would flatter the sample: they are taken out, then one step refills the queue."""
    step, batch = workload.step(channels_last=True, compiled=False), first_batch(workload)
    loader = SlowLoader(batch, 0.0)
    together = Together(EndlessBatches(loader, 1), step, 5)  # type: ignore[arg-type]
    together.probe.settle()
    assert len(loader.threads) == 5 + 1


def test_discarded_batches_are_drawn_beside_the_step_one_for_one(workload: Workload) -> None:
    step, batch = workload.step(channels_last=True, compiled=False), first_batch(workload)
    loader = SlowLoader(batch, 0.0)
    reader = DiscardingReader(EndlessBatches(loader, 1), CPU)  # type: ignore[arg-type]
    before = threading.active_count()
    rates = sample(contention_probe(reader, step, batch, 3), QUICK, CPU)
    assert len(rates) == 5
    assert set(loader.threads) == {"discarded batches"}
    # After the last step of each of the 6 samples a draw may be left out; never is one drawn ahead.
    assert reader.num_steps - 6 <= reader.num_drawn <= reader.num_steps
    assert threading.active_count() == before


def test_a_loader_slower_than_the_step_does_not_hold_it_up(workload: Workload) -> None:
    step, batch = workload.step(channels_last=True, compiled=False), first_batch(workload)
    reader = DiscardingReader(EndlessBatches(SlowLoader(batch, 1.0), 1), CPU)  # type: ignore[arg-type]
    started_s = time.perf_counter()
    for _ in range(4):
        reader.want_one()
        step(batch, 3)
    elapsed_s = time.perf_counter() - started_s
    reader.stop()
    assert reader.num_drawn <= 1 + elapsed_s / 1.0 < reader.num_steps


def test_a_loader_that_fails_beside_the_step_is_the_reason_of_the_row(workload: Workload) -> None:
    class Failing(SlowLoader):
        def epoch(self, epoch: int, start_step: int = 0) -> Any:
            raise ShardError("the shard is gone")
            yield

    step, batch = workload.step(channels_last=True, compiled=False), first_batch(workload)

    class Lazy(EndlessBatches):
        def __init__(self) -> None:
            self._batches = Failing(batch, 0).epoch(0)

    reader = DiscardingReader(Lazy(), CPU)
    probe = contention_probe(reader, step, batch, 3)
    assert sample(replace(probe, settle=lambda: time.sleep(0.05)), Budget(repeats=5, seconds=0.5), CPU) == "the shard is gone"
    assert all(thread.name != "discarded batches" for thread in threading.enumerate())


def test_end_to_end_counts_the_time_that_the_step_waits(workload: Workload) -> None:
    step, batch = workload.step(channels_last=True, compiled=False), first_batch(workload)
    stalls = {}
    for name, batch_s in (("fast", 0.0), ("slow", 0.1)):
        together = Together(EndlessBatches(SlowLoader(batch, batch_s), 1), step, 1)  # type: ignore[arg-type]
        rates = sample(together.probe, QUICK, CPU)
        assert len(rates) == len(together.stall_shares) == 5
        stalls[name] = sorted(together.stall_shares)[2]
        if name == "slow":
            assert max(rates) < len(batch.ids_S) / 0.1
    assert 2 * stalls["fast"] < stalls["slow"] <= 1.0


def test_loader_and_step_rows_count_decoded_images(workload: Workload) -> None:
    loader = workload.loader()
    batches = EndlessBatches(loader, 1)
    step, batch = workload.step(channels_last=True, compiled=False), first_batch(workload)
    probes = {"loader": loader_probe(batches, 2), "step": step_probe(step, batch, batches.num_steps)}
    assert probes["step"].work() == 8  # 4 instance and 4 partner images
    outcomes = sample_in_turns(probes, QUICK, CPU)
    loader.close()
    assert [len(outcomes[name]) for name in probes] == [5, 5]


def test_parts_of_the_step_add_up_to_the_step(workload: Workload) -> None:
    step, batch = workload.step(channels_last=True, compiled=False), first_batch(workload)
    rows = {row.key: row for row in part_rows(step, batch, 3, Budget(repeats=5, seconds=0.1))}
    assert list(rows) == [f"part.{name}" for name in PARTS]
    whole = sample(step_probe(step, batch, 3), Budget(repeats=5, seconds=0.1), CPU)
    assert not isinstance(whole, str)
    seconds_of_parts = sum(1 / max(row.rates) for row in rows.values())
    assert seconds_of_parts == pytest.approx(1 / max(whole), rel=0.5)


def test_operations_of_a_forward_pass(workload: Workload) -> None:
    """ResNet-20 at 32 px: 40.8 million multiplications in its convolutions (He et al. 2016 count 41 million with their layer)."""
    step = workload.step(channels_last=True, compiled=False)
    assert forward_flops(step, 32) / 2 == pytest.approx(40.8e6, rel=0.03)
    assert step.model.training


def test_ranges_change_no_bit_of_the_training(workload: Workload) -> None:
    batch = first_batch(workload)
    plain, ranged = (workload.step(channels_last=True, compiled=False) for _ in range(2))
    put_ranges(ranged, cuda=False)
    for _ in range(3):
        one, other = plain(batch, 3), ranged(batch, 3)
        assert {name: value.item() for name, value in one.items()} == {name: value.item() for name, value in other.items()}
    for mine, theirs in zip(plain.model.state_dict().values(), ranged.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_trace_holds_every_range_once_a_step(workload: Workload, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(workload, path, num_steps=4)
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == "user_annotation"]
    counts = {name: sum(event["name"] == name for event in events) for name in (DATA_WAIT, *STEP_RANGES.values())}
    assert counts == dict.fromkeys(("data wait", "views", "forward", "loss", "backward", "optimizer"), 4)
    starts = [next(event["ts"] for event in events if event["name"] == name) for name in counts]
    assert starts == sorted(starts)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        ({"dataset": "demo"}, ConfigError, "holds data set 'cifar10-lt', not 'demo'"),
        ({"data": replace(CONFIG.data, loader="torch")}, ConfigError, "unknown loader 'torch'"),
    ],
)
def test_a_workload_that_cannot_be_is_one_sentence(make_shards: Any, change: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        Workload(replace(CONFIG, **change), make_shards())


def test_a_loss_without_contrastive_term_is_measured_from_the_first_epoch_it_takes_part_in(make_shards: Any) -> None:
    config = replace(CONFIG, loss=LossConfig(contrastive_warmup_epochs=0))
    assert Workload(config, make_shards()).first_epoch == 0
