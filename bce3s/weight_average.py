"""An exponential moving average of the weights, evaluated beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bce3s.models import FeatureMemory
from pipelines.types import ConfigError


class WeightAverage:
    """Averages of all parameters and floating-point buffers, batch-norm's statistics among them; on the model's device, in its precision.

    Whole-number and boolean buffers and the feature memory, which is a table of latest values, have no average: under `applied` the model
    keeps its own. The decay of update t = 0, 1, … is min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten (as
    TensorFlow's ExponentialMovingAverage does with `num_updates`).

    Args:
        model: where it will stay: on its device and in its memory format.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts with the weights as they are."""
        memories = [f"{name}." for name, module in model.named_modules() if isinstance(module, FeatureMemory)]
        averaged = {
            name: tensor
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if tensor.is_floating_point() and not name.startswith(tuple(memories))
        }
        self.decay = decay
        self.num_updates = 0
        self._names = list(averaged)
        self._weights = list(averaged.values())
        self._averages = [tensor.detach().clone() for tensor in self._weights]
        self._is_applied = False

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after one optimizer step, in place and without a wait for the device.

        The decay is a number of the host that changes from step to step: call this beside a captured graph, not within.
        """
        assert not self._is_applied, "the averages are in the model"
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        self.num_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model's weights are the averages; afterwards they are what they were, bit for bit and at the same addresses.

        Nothing is copied: model and averages exchange their memory. So a captured graph, which knows addresses, is not replayed within.
        """
        self._exchange()
        self._is_applied = True
        try:
            yield
        finally:
            self._exchange()
            self._is_applied = False

    def _exchange(self) -> None:
        for weight, average in zip(self._weights, self._averages, strict=True):
            weight.data, average.data = average.data, weight.data

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the averages by name, not copied, and the number of updates."""
        assert not self._is_applied, "the averages are in the model"
        return {"num_updates": self.num_updates, "averages": dict(zip(self._names, self._averages, strict=True))}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned, copied into place.

        Raises:
            ConfigError: the averages are of another network.
        """
        assert not self._is_applied, "the averages are in the model"
        averages: dict[str, Tensor] = state["averages"]
        for name, average in zip(self._names, self._averages, strict=True):
            if name not in averages or averages[name].shape != average.shape:
                raise ConfigError(
                    f"the averaged weights in the checkpoint are of another network ('{name}'); name the --arch it was made with"
                )
        torch._foreach_copy_(self._averages, [averages[name] for name in self._names])
        self.num_updates = int(state["num_updates"])
