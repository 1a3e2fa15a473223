"""Optimizers against their textbooks, resumed to the bit, with a parameter that joins late, and without a read from the device."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bce3s.checkpoint import load_checkpoint, save_checkpoint
from bce3s.config import OPTIMIZERS, OptimizerConfig
from bce3s.optimizers import LARS_TRUST, Lars, build_optimizer, clip_gradients, learning_rate_at, set_learning_rate

CPU = torch.device("cpu")
CONFIG = OptimizerConfig(learning_rate=0.05, weight_decay=0.01)
RATES = (0.05, 0.02, 0.03)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).to(memory_format=torch.channels_last)


def give_gradients(model: nn.Module, step: int, without: str = "none") -> None:
    """Gradients that are a function of the step; names that start with `without` have none."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in model.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name.startswith(without) else torch.empty_like(parameter).copy_(gradient)


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, late: str = "none") -> None:
    for step in steps:
        give_gradients(model, step, without=late if step < 2 else "none")
        set_learning_rate(optimizer, RATES[step % len(RATES)])
        optimizer.step()


# ---- one loop over numbers for each optimizer, as its paper writes it; the state starts when a parameter first has a gradient

Textbook = Callable[[Tensor, Tensor, dict[str, Tensor], float, OptimizerConfig, float], Tensor]


def textbook_sgd(w: Tensor, g: Tensor, state: dict[str, Tensor], rate: float, config: OptimizerConfig, decay: float) -> Tensor:
    g = g + decay * w
    state["v"] = config.momentum * state["v"] + g if "v" in state else g
    return w - rate * (g + config.momentum * state["v"] if config.nesterov else state["v"])


def textbook_adamw(w: Tensor, g: Tensor, state: dict[str, Tensor], rate: float, config: OptimizerConfig, decay: float) -> Tensor:
    zero = torch.zeros_like(w)
    t = state.get("t", torch.zeros(())) + 1
    m = config.momentum * state.get("m", zero) + (1 - config.momentum) * g
    v = config.beta2 * state.get("v", zero) + (1 - config.beta2) * g * g
    state.update(t=t, m=m, v=v)
    w = w - rate * decay * w
    return w - rate * (m / (1 - config.momentum**t)) / ((v / (1 - config.beta2**t)).sqrt() + 1e-8)


def textbook_lars(w: Tensor, g: Tensor, state: dict[str, Tensor], rate: float, config: OptimizerConfig, decay: float) -> Tensor:
    ratio = float(LARS_TRUST * w.norm() / (g.norm() + decay * w.norm())) if w.ndim > 1 else 1.0
    state["v"] = config.momentum * state.get("v", torch.zeros_like(w)) + rate * ratio * (g + decay * w)
    return w - state["v"]


TEXTBOOKS: dict[str, Textbook] = {"sgd": textbook_sgd, "adamw": textbook_adamw, "lars": textbook_lars}


@pytest.mark.parametrize(
    "config",
    [
        *(replace(CONFIG, name=name) for name in OPTIMIZERS),
        replace(CONFIG, name="sgd", nesterov=True),
        replace(CONFIG, name="sgd", momentum=0.0),
        replace(CONFIG, name="lars", momentum=0.0),
        replace(CONFIG, name="adamw", decay_norm_and_bias=False),
        replace(CONFIG, name="lars", decay_norm_and_bias=False, weight_decay=0.3),
    ],
    ids=lambda config: f"{config.name}-{config.momentum}-{config.nesterov}-{config.decay_norm_and_bias}",
)
def test_steps_are_the_textbooks_also_for_a_part_that_joins_late(config: OptimizerConfig) -> None:
    """The last layer has no gradient for two steps: it must stay as it is, then begin as if it were new."""
    model = network()
    wanted = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in wanted}
    run_steps(model, build_optimizer(model, config, CPU), range(5), late="3.")
    other = network()
    for step in range(5):
        give_gradients(other, step, without="3." if step < 2 else "none")
        for name, parameter in other.named_parameters():
            decay = config.weight_decay if config.decay_norm_and_bias or parameter.ndim > 1 else 0.0
            if parameter.grad is not None:
                rate = RATES[step % len(RATES)]
                wanted[name] = TEXTBOOKS[config.name](wanted[name], parameter.grad.double(), states[name], rate, config, decay)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), wanted[name], rtol=2e-5, atol=1e-6)


def saved_and_loaded(state: dict[str, object]) -> dict[str, object]:
    """Through a checkpoint, which keeps values and no memory layouts."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "state.safetensors", state)
        return load_checkpoint(Path(folder) / "state.safetensors", CPU)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_resumed_run_ends_with_the_same_bits(name: str, stop: int) -> None:
    """Saved before the first step, while a part has no gradient yet, and after it joined."""
    config = replace(CONFIG, name=name)
    model = network()
    optimizer = build_optimizer(model, config, CPU)
    run_steps(model, optimizer, range(stop), late="3.")
    resumed = copy.deepcopy(model)
    other = build_optimizer(resumed, config, CPU)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    run_steps(model, optimizer, range(stop, 6), late="3.")
    run_steps(resumed, other, range(stop, 6), late="3.")
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_of_a_gpu_continues_on_a_cpu(name: str) -> None:
    """There the rate is a tensor and AdamW capturable; here the rate must become a number again."""
    model = network()
    optimizer = build_optimizer(model, replace(CONFIG, name=name), CPU)
    run_steps(model, optimizer, range(1))
    state = saved_and_loaded(optimizer.state_dict())
    for group in state["param_groups"]:  # type: ignore[attr-defined]
        group.update(lr=torch.tensor(0.125), capturable=True)
    optimizer.load_state_dict(state)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125]
    assert not isinstance(optimizer.param_groups[0]["lr"], Tensor)
    run_steps(model, optimizer, range(1, 3))


def reads_in(action: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::_local_scalar_dense", "aten::nonzero"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_reads_nothing_back(name: str) -> None:
    model = network()
    optimizer = build_optimizer(model, replace(CONFIG, name=name), CPU)
    give_gradients(model, 0)
    # AdamW's CPU kernel reads its step counters, which lie on the host there; the CUDA kernel is given their addresses.
    counters = len(list(model.parameters())) if name == "adamw" else 0

    def step() -> None:
        set_learning_rate(optimizer, 0.01)
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()

    assert reads_in(step) == counters


def test_the_check_sees_a_read() -> None:
    assert reads_in(lambda: torch.ones(()).item()) == 1


def test_lars_takes_a_rate_on_the_device() -> None:
    """A tensor, filled in place, moves the weights as the same number would, and is not read."""
    models = network(), network()
    rate = torch.tensor(0.05)
    tensor, number = Lars(models[0].parameters(), rate), Lars(models[1].parameters(), 0.05)
    for optimizer, model in ((tensor, models[0]), (number, models[1])):
        run_steps(model, optimizer, range(2))
        give_gradients(model, 2)
    assert tensor.param_groups[0]["lr"] is rate
    assert reads_in(tensor.step) == 0
    number.step()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_lars_moves_a_weight_of_zeros_and_spares_gradients() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    Lars([weight], 0.5, momentum=0.0).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.5))
    assert torch.equal(weight.grad, torch.ones(2, 2))


def parameter_groups(optimizer: torch.optim.Optimizer) -> Iterator[tuple[float, list[Tensor]]]:
    yield from ((group["weight_decay"], group["params"]) for group in optimizer.param_groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_spares_norms_and_biases_on_request(name: str) -> None:
    model = network()
    config = replace(CONFIG, name=name)
    spared = dict(parameter_groups(build_optimizer(model, replace(config, decay_norm_and_bias=False), CPU)))[0.0]
    assert {id(p) for p in spared} == {id(p) for p in model.parameters() if p.ndim <= 1}
    assert [decay for decay, _ in parameter_groups(build_optimizer(model, config, CPU))] == [0.01]


def test_gradients_are_clipped_by_their_common_norm() -> None:
    model = network()
    give_gradients(model, 0)
    model[1].weight.grad = None  # type: ignore[index]
    before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    norm = clip_gradients(model.parameters(), 0.5)
    after = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(after, before * 0.5 / before.norm())
    clip_gradients(model.parameters(), 2.0)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), after)


def test_rate_warms_up_and_falls_to_zero() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_epochs=2)
    assert [learning_rate_at(config, 10, progress) for progress in (0, 1, 2, 6, 10)] == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0])


def test_rate_per_epoch_is_constant_within_an_epoch() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="epoch")
    assert learning_rate_at(config, 4, 1.0) == learning_rate_at(config, 4, 1.99) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate_at(config, 4, 0.5) == 1.0


def test_warmup_by_epoch_starts_above_zero_and_takes_at_most_half_of_the_epochs() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="epoch", warmup_epochs=4)
    assert [learning_rate_at(config, 20, epoch) for epoch in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert learning_rate_at(OptimizerConfig(learning_rate=1.0, warmup_epochs=5), 2, 1.0) == 1.0


@pytest.mark.cuda
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_captured_step_follows_the_rate_and_a_load_keeps_its_address(name: str) -> None:
    device = torch.device("cuda")
    models = network().to(device), network().to(device)
    plain, captured = (build_optimizer(model, replace(CONFIG, name=name), device) for model in models)
    captured.load_state_dict(plain.state_dict())
    rate = captured.param_groups[0]["lr"]
    assert rate is captured.defaults["lr"]
    assert rate.is_cuda
    for model in models:
        give_gradients(model, 0)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        captured.step()
    for value in (0.5, 0.25, 0.0):
        set_learning_rate(plain, value)
        set_learning_rate(captured, value)
        plain.step()
        graph.replay()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two)
