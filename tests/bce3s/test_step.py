"""The training step: schedule, optimizer, no host read, and a golden ten-step loss that a refactor must not move."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from bce3s.config import LossConfig, ModelConfig, OptimizerConfig, TrainConfig
from bce3s.device import resolve_placement
from bce3s.losses import LOSSES, build_loss
from bce3s.step import TrainStep, build_optimizer, learning_rate_at
from bce3s.train import build_model
from pipelines.config import AugmentConfig, DataConfig
from pipelines.loaders import build_loader
from pipelines.types import Batch

CONFIG = TrainConfig(
    dataset="cifar10-lt",
    epochs=2,
    precision="fp32",
    device="cpu",
    data=DataConfig(
        loader="resident", batch_size=8, augment=AugmentConfig(crop="pad", policy="autoaugment-cifar10", cutout=8, eval_crop=1.0)
    ),
    model=ModelConfig(arch="resnet20-cifar", projection_dim=16),
    optimizer=OptimizerConfig(learning_rate=0.05, weight_decay=5e-4),
)


def step_for(config: TrainConfig, num_classes: int = 4) -> TrainStep:
    placement = resolve_placement(config)
    return TrainStep(
        build_model(config, num_classes, placement), build_loss(config.loss, torch.ones(num_classes, dtype=torch.int64)), config, placement
    )


def batches_for(shards: Any, config: TrainConfig, epoch: int = 0) -> tuple[list[Batch], int]:
    loader = build_loader(shards, "train", config.data, seed=config.seed, device=torch.device("cpu"))
    return list(loader.epoch(epoch)), loader.num_steps


def test_rate_warms_up_and_falls_to_zero() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_epochs=2)
    rates = [learning_rate_at(config, 10, progress) for progress in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0])


def test_rate_per_epoch_is_constant_within_an_epoch() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="epoch")
    assert learning_rate_at(config, 4, 1.0) == learning_rate_at(config, 4, 1.99) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate_at(config, 4, 0.5) == 1.0


def test_warmup_by_epoch_starts_above_zero_and_takes_at_most_half_of_the_epochs() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="epoch", warmup_epochs=4)
    assert [learning_rate_at(config, 20, epoch) for epoch in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert learning_rate_at(OptimizerConfig(learning_rate=1.0, warmup_epochs=5), 2, 1.0) == 1.0


def test_optimizer_follows_the_textbook_momentum() -> None:
    """Zero momenta at the start give the step of torch's unfused SGD, which starts them with the first gradient."""
    torch.manual_seed(0)
    steps = {}
    for name in ("ours", "torch"):
        step = step_for(CONFIG)
        parameters = list(step.model.backbone.parameters())
        optimizer = step.optimizer if name == "ours" else torch.optim.SGD(step.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        for scale in (1.0, -0.5, 0.25):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, scale)
            optimizer.step()
        steps[name] = parameters
    for one, other in zip(steps["ours"], steps["torch"], strict=True):
        torch.testing.assert_close(one, other)


def test_weight_decay_spares_norms_and_biases_on_request() -> None:
    model = step_for(CONFIG).model
    groups = build_optimizer(model, replace(CONFIG.optimizer, decay_norm_and_bias=False)).param_groups
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert spared == {id(p) for p in model.parameters() if p.ndim <= 1}
    assert all(not buffer["momentum_buffer"].any() for buffer in build_optimizer(model, CONFIG.optimizer).state.values())
    for every in (groups, build_optimizer(model, CONFIG.optimizer).param_groups):
        assert sum(len(group["params"]) for group in every) == len(list(model.parameters()))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_trains_every_part_its_loss_uses(make_shards: Any, loss: str) -> None:
    config = replace(CONFIG, loss=LossConfig(name=loss))
    step = step_for(config)
    before = {name: parameter.clone() for name, parameter in step.model.named_parameters()}
    for epoch in (0, 1):
        batches, num_steps = batches_for(make_shards(), config, epoch)
        terms = [step(batch, num_steps) for batch in batches[:3]]
    assert all(torch.isfinite(value) for found in terms for value in found.values())
    moved = {name.split(".")[0] for name, parameter in step.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"backbone", "classifier"} | ({"projector"} if loss == "bce3s" else set())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_whole_step_reads_nothing_back_from_the_device(make_shards: Any, loss: str) -> None:
    config = replace(CONFIG, loss=LossConfig(name=loss))
    step = step_for(config)
    batches, num_steps = batches_for(make_shards(), config, epoch=1)
    step(batches[0], num_steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(batches[1], num_steps)
    reads = [event.key for event in profile.key_averages() if event.key in ("aten::item", "aten::_local_scalar_dense", "aten::nonzero")]
    assert reads == []


def test_golden_ten_steps(make_shards: Any) -> None:
    """Losses of ten steps in fp32; they move with the order, the augmentation, the loss or the optimizer, and with nothing else."""
    shards = make_shards()
    step = step_for(CONFIG)
    totals: list[float] = []
    for epoch in (0, 1):
        batches, num_steps = batches_for(shards, CONFIG, epoch)
        totals += [step(batch, num_steps)["total"].item() for batch in batches[:5]]
    assert totals == pytest.approx(GOLDEN, rel=2e-3)


GOLDEN = [4.9368, 5.6542, 4.3439, 4.0102, 4.3956, 4.5492, 4.8287, 3.9902, 5.8682, 4.3013]


def test_bf16_follows_fp32(make_shards: Any) -> None:
    totals = {}
    for precision in ("fp32", "bf16"):
        config = replace(CONFIG, precision=precision)
        step = step_for(config)
        batches, num_steps = batches_for(make_shards(), config)
        totals[precision] = [step(batch, num_steps)["total"].item() for batch in batches]
    assert totals["bf16"] == pytest.approx(totals["fp32"], rel=0.05)


def test_clipping_bounds_the_gradient_in_every_precision(make_shards: Any) -> None:
    for precision in ("fp32", "bf16"):
        config = replace(CONFIG, precision=precision, optimizer=replace(CONFIG.optimizer, clip_norm=0.01))
        step = step_for(config)
        batches, num_steps = batches_for(make_shards(), config)
        step(batches[0], num_steps)
        squares = [parameter.grad.square().sum() for parameter in step.model.parameters() if parameter.grad is not None]
        assert torch.stack(squares).sum().sqrt() <= 0.0101


@pytest.mark.cuda
def test_a_cuda_step_never_waits_for_the_device(make_shards: Any) -> None:
    config = replace(CONFIG, device="cuda", precision="bf16")
    step = step_for(config)
    loader = build_loader(make_shards(), "train", config.data, seed=0, device=torch.device("cuda", 0))
    batches = list(loader.epoch(1))
    step(batches[0], loader.num_steps)
    running = iter(loader.epoch(2))
    next(running)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(next(running), loader.num_steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
