"""A step can be captured: what one step computed, computed again on other inputs at the same addresses, is the next step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bce3s.config import LossConfig, OptimizerConfig, TrainConfig
from bce3s.device import apply_numerics
from bce3s.losses import fused_bce
from bce3s.step import TrainStep
from pipelines.augment import mix
from pipelines.types import Batch
from tests.bce3s.losses.cases import METHODS
from tests.bce3s.test_step import CONFIG, SMALL, batches_for, step_for


class Tape(TorchDispatchMode):
    """Records every kernel of a step with its very arguments, and runs them again into the same results: what a CUDA graph does.

    A number that Python computes anew for every step would be repeated as it was, and show as a difference.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, recorded in self._calls:
            repeated = function(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(repeated), strict=True):
                # Views and in-place kernels give back memory of their arguments, which is up to date.
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def follow_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels compiled by numba are invisible to a tape, as they would be to a CUDA graph; on CUDA torch's and Triton's run instead."""
    monkeypatch.setattr(mix, "_is_compiled_for", lambda device, dtype: False)
    monkeypatch.setattr(fused_bce, "_row_kernels", lambda device, dtype: None)


@pytest.mark.parametrize("loss", METHODS)
def test_a_recorded_step_replays_on_other_batches(make_shards: Any, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    follow_addresses(monkeypatch)
    assert_replays(make_shards, loss, "sgd")


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_a_recorded_step_of_every_optimizer_replays(make_shards: Any, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    follow_addresses(monkeypatch)
    assert_replays(make_shards, "bce3s", optimizer)


def assert_replays(make_shards: Any, loss: str, name: str) -> None:
    """Two steps that were replayed leave what six eager ones do, bit for bit."""
    optimizer = OptimizerConfig(name=name, learning_rate=0.01, warmup_epochs=1, clip_norm=1.0)
    config = replace(SMALL, loss=LossConfig(name=loss), optimizer=optimizer, accumulate_steps=2)
    batches, num_steps = batches_for(make_shards(train=(40, 20, 10, 10, 8, 8)), config, epoch=1)
    eager, taped = (step_for(config, num_classes=6) for _ in range(2))
    for batch in batches[:6]:
        expected = eager(batch, num_steps)
    found = replayed(taped, batches[:6], num_steps, config)
    assert {name: value.item() for name, value in found.items()} == {name: value.item() for name, value in expected.items()}
    states = (step.model.state_dict() for step in (eager, taped))
    assert [
        name for (name, one), other in zip(next(states).items(), next(states).values(), strict=True) if not torch.equal(one, other)
    ] == []


def replayed(step: TrainStep, batches: list[Batch], num_steps: int, config: TrainConfig) -> dict[str, Tensor]:
    """Three steps as they are, the fourth recorded, the others replayed; the terms of the last."""
    for group in step.optimizer.param_groups:
        group["lr"] = torch.tensor(0.0, dtype=torch.float64)  # as on CUDA; on a CPU a kernel would read it, which the tape does not mind
    for batch in batches[:3]:
        step(batch, num_steps)
    inputs = replace(
        batches[3], images_SHWC=batches[3].images_SHWC.clone(), labels_S=batches[3].labels_S.clone(), mix=batches[3].mix.clone()
    )  # type: ignore[union-attr]
    step.schedule(batches[3], num_steps)
    with Tape() as tape:
        terms = step.apply(inputs)
    for batch in batches[4:]:
        inputs.images_SHWC.copy_(batch.images_SHWC)
        inputs.labels_S.copy_(batch.labels_S)
        inputs.mix.copy_(batch.mix)  # type: ignore[union-attr, arg-type]
        step.schedule(batch, num_steps)
        tape.replay()
    return terms


def test_the_tape_sees_a_number_that_python_computes_anew() -> None:
    value, scale = torch.ones(2), 3.0
    with Tape() as tape:
        result = value * scale
    scale = 5.0
    value.fill_(2.0)
    tape.replay()
    assert result.tolist() == [6.0, 6.0] != (value * scale).tolist()


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("loss", METHODS)
def test_a_graphed_run_gives_the_losses_of_an_eager_one(
    make_shards: Any, request: pytest.FixtureRequest, loss: str, precision: str
) -> None:
    config = replace(CONFIG, device="cuda", precision=precision, deterministic=True, loss=LossConfig(name=loss))
    apply_numerics(config)
    request.addfinalizer(lambda: apply_numerics(CONFIG))
    totals: dict[bool, list[float]] = {}
    for graphed in (False, True):
        step = step_for(replace(config, cuda_graphs=graphed))
        batches, num_steps = batches_for(make_shards(), config, epoch=1)
        totals[graphed] = [step(batch, num_steps)["total"].item() for batch in batches]
    assert totals[True] == pytest.approx(totals[False], rel=1e-3)
