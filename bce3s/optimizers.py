"""How parameters follow their gradients: the optimizers by name, their learning rate and clipping; nothing is read back from the device.

Muon is left out: torch's takes matrices only, and nearly all weights of these networks are convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bce3s.config import OptimizerConfig

LARS_TRUST = 0.001
"""η of You et al. 2017: how far a layer may move in one step, relative to its norm, at learning rate 1."""


def learning_rate_at(config: OptimizerConfig, epochs: int, progress: float) -> float:
    """The rate at `progress` epochs: linear warm-up over at most half of the epochs, then a half cosine to 0 at `epochs`.

    With `schedule` "epoch" the rate is constant within an epoch, as in the reference, which also steps its schedule before the first
    epoch (traps.md A7: its last epoch runs at rate 0); here epoch e runs at the rate of its start, and warm-up at that of its end.
    """
    warmup = min(config.warmup_epochs, epochs / 2)
    if config.schedule == "epoch":
        progress = math.floor(progress)
        if progress < warmup:
            return config.learning_rate * min(1.0, (progress + 1) / warmup)
    if progress < warmup:
        return config.learning_rate * progress / warmup
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (epochs - warmup))))


def build_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a run; norms and biases in a group of their own if they are spared weight decay.

    State is made for every parameter at once, as zeros: a parameter without a gradient keeps its own, joins later as if it were new, and
    a graph that replays the step finds everything at addresses that stay. A loaded state is at new addresses: load before capturing.

    Args:
        model: float32 parameters, already on `device`.
        config: of the run.
        device: on CUDA the learning rate is a tensor there, which a captured graph reads anew; on a CPU it is a float.
    """
    spared = [] if config.decay_norm_and_bias else [p for p in model.parameters() if p.ndim <= 1]
    decayed = [p for p in model.parameters() if config.decay_norm_and_bias or p.ndim > 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    on_cuda = device.type == "cuda"
    rate: Any = torch.tensor(config.learning_rate, device=device) if on_cuda else config.learning_rate
    optimizer = _BUILDERS[config.name](groups, rate, config, on_cuda)
    for parameter in model.parameters():
        optimizer.state[parameter] = _fresh_state(parameter, config)
    optimizer.register_load_state_dict_post_hook(_keep_own_settings)
    return optimizer


def _sgd(groups: Any, rate: Any, config: OptimizerConfig, on_cuda: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, nesterov=config.nesterov, fused=True)


def _adamw(groups: Any, rate: Any, config: OptimizerConfig, on_cuda: bool) -> torch.optim.Optimizer:
    betas = (config.momentum, config.beta2)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True, capturable=on_cuda)


def _lars(groups: Any, rate: Any, config: OptimizerConfig, on_cuda: bool) -> torch.optim.Optimizer:
    return Lars(groups, rate, config.momentum)


_BUILDERS: dict[str, Callable[[Any, Any, OptimizerConfig, bool], torch.optim.Optimizer]] = {"sgd": _sgd, "adamw": _adamw, "lars": _lars}


def _fresh_state(parameter: nn.Parameter, config: OptimizerConfig) -> dict[str, Tensor]:
    if config.name == "adamw":
        step = torch.zeros((), device=parameter.device)
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    # A zero momentum takes the same first step as torch's, which begins with the first gradient. But the fused kernel wants all of a group
    # or none, the projector joins an epoch late, and a first step that fp16's scaler skips would leave torch's own uninitialised.
    return {"momentum_buffer": torch.zeros_like(parameter)} if config.momentum else {}


def _keep_own_settings(optimizer: torch.optim.Optimizer) -> None:
    # A checkpoint keeps values, not memory layouts, and fused kernels walk weight, gradient and state in step, as they lie in memory.
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    # torch overwrites these with the checkpoint's, which may be of another device; a captured graph reads the rate at its one address.
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group.update({name: optimizer.defaults[name] for name in ("lr", "fused", "foreach", "capturable") if name in optimizer.defaults})
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of all groups: in place on CUDA, without a wait for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients in place so that their global norm is at most `max_norm`; returns the norm before, float32 [].

    Under fp16's scaler unscale first. A norm that is not finite makes every gradient NaN or zero: check the loss.
    """
    return nn.utils.clip_grad_norm_(parameters, max_norm)


class Lars(torch.optim.Optimizer):
    """SGD whose rate is scaled, for each weight w of two or more dimensions with gradient g, by η·‖w‖ / (‖g‖ + decay·‖w‖).

    Source: You, Gitman and Ginsburg 2017, algorithm 1: the rate enters the momentum, v ← m·v + rate·ratio·(g + decay·w), w ← w − v.
    Vectors (biases, norms) and weights or gradients of norm zero have ratio 1.

    Gradients must be unscaled: `GradScaler.step` does that, and reads from the device whether to skip the step, as for any optimizer that
    is not fused.

    Args:
        params: parameters or groups of them; a group's `weight_decay` is its own, and 0 if it says nothing.
        lr: float, or float32 [] on the parameters' device.
        momentum: m.
        trust: η.
    """

    def __init__(self, params: Any, lr: float | Tensor, momentum: float = 0.9, trust: float = LARS_TRUST) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient; gradients stay as they are."""
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not weights:
                continue
            gradients: list[Tensor] = [weight.grad for weight in weights]
            moves = list(torch._foreach_mul(_decayed(gradients, weights, group["weight_decay"]), _rates(weights, gradients, group)))
            if group["momentum"]:
                velocities = [self._velocity(weight) for weight in weights]
                torch._foreach_mul_(velocities, group["momentum"])
                torch._foreach_add_(velocities, moves)
                moves = velocities
            torch._foreach_sub_(weights, moves)

    def _velocity(self, weight: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]


def _decayed(gradients: list[Tensor], weights: list[Tensor], weight_decay: float) -> list[Tensor]:
    return list(torch._foreach_add(gradients, weights, alpha=weight_decay)) if weight_decay else gradients


def _rates(weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The rate of each weight, as tensors [] on the device."""
    weight_norms, gradient_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, gradients))
    ratios = group["trust"] * weight_norms / (gradient_norms + group["weight_decay"] * weight_norms)
    usable = (weight_norms > 0) & (gradient_norms > 0)
    rates, unscaled = torch.where(usable, ratios, 1.0) * group["lr"], torch.ones_like(ratios[0]) * group["lr"]
    return [rate if weight.ndim > 1 else unscaled for rate, weight in zip(rates.unbind(), weights, strict=True)]
