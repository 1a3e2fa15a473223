"""What the benchmarks of the step share: a batch made up once, steps on it in any setting, and figures of what took turns."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from turns import current_commit

from bce3s.config import ModelConfig, OptimizerConfig, TrainConfig, override
from bce3s.device import Placement, resolve_placement
from bce3s.distributed import ALONE, World
from bce3s.losses import build_loss
from bce3s.step import TrainStep
from bce3s.throughput.rows import VIEWS_PER_DECODED
from bce3s.throughput.timing import Budget, Probe, sample_in_turns
from bce3s.train import build_model
from pipelines.augment.mix import draw_mix
from pipelines.config import DataConfig
from pipelines.types import Batch

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every row is built from.

    Args:
        arch: a name of `bce3s.models.ARCHS`.
        image_size: side in pixels.
        batch_size: B of the whole batch; a step trains on 3·B views.
        num_classes: K.
        device: as `--device` names it.
        settings: "path=value", of every row.
    """

    arch: str
    image_size: int
    batch_size: int
    num_classes: int
    device: str
    settings: tuple[str, ...] = ()

    def config(self, *settings: str) -> TrainConfig:
        """The run's settings with a row's own in their place.

        Raises:
            ConfigError: an unknown setting or a value it does not take.
        """
        base = TrainConfig(
            dataset="synthetic",
            epochs=2,
            device=self.device,
            data=DataConfig(batch_size=self.batch_size, image_size=self.image_size),
            model=ModelConfig(arch=self.arch),
            # So small that hundreds of steps on one batch leave the losses, and so the arithmetic, as they are at the start.
            optimizer=OptimizerConfig(learning_rate=1e-4),
        )
        return override(base, [*self.settings, *settings])

    def placement(self, *settings: str) -> Placement:
        """Where a row's step runs."""
        return resolve_placement(self.config(*settings))

    def step(self, *settings: str, world: World = ALONE) -> TrainStep:
        """A fresh network with its training step."""
        config = self.config(*settings)
        placement = resolve_placement(config)
        model = build_model(config, self.num_classes, placement)
        model.train()
        counts_K = torch.ones(self.num_classes, dtype=torch.int64, device=placement.device)
        return TrainStep(model, build_loss(config.loss, counts_K), config, placement, world)

    def batch(self, num_sources: int | None = None) -> Batch:
        """Noise: `num_sources` source images, by default B, and their partners, in the first epoch in which all terms take part."""
        config, device = self.config(), self.placement().device
        rng, num_images, side = np.random.default_rng(0), 2 * (num_sources or self.batch_size), self.image_size
        epoch = config.loss.contrastive_warmup_epochs
        return Batch(
            images_SHWC=torch.from_numpy(rng.integers(0, 256, (num_images, side, side, 3), np.uint8)).to(device),
            labels_S=torch.from_numpy(rng.integers(0, self.num_classes, num_images)).to(device),
            ids_S=np.arange(num_images),
            mix=torch.from_numpy(draw_mix(config.seed, epoch, 0, side, config.data.augment)).to(device),
            epoch=epoch,
            step=0,
        )


def spread(name: str, values: list[float]) -> Figures:
    """Median and range of one figure under its name, such as "step_ms"."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def sample_steps(
    probes: Mapping[str, Probe], budget: Budget, device: torch.device
) -> tuple[dict[str, tuple[float, ...] | str], dict[str, list[float]]]:
    """`sample_in_turns` of probes whose unit is a step, and beside it this process's processor time, in ms a step.

    With one thread on a CPU that is what other programs on the machine disturb least; on CUDA it is the host's work.
    """
    processor_ms: dict[str, list[float]] = {name: [] for name in probes}
    metered = {name: _metered(probe, processor_ms[name]) for name, probe in probes.items()}
    return sample_in_turns(metered, budget, device), processor_ms


def _metered(probe: Probe, found_ms: list[float]) -> Probe:
    began_s, num_steps = 0.0, 0

    def settle() -> None:
        nonlocal began_s, num_steps
        probe.settle()
        began_s, num_steps = time.process_time(), 0

    def work() -> int:
        nonlocal num_steps
        num_steps += 1
        return probe.work()

    def finished(elapsed_s: float) -> None:
        found_ms.append((time.process_time() - began_s) / num_steps * 1e3)
        probe.finished(elapsed_s)

    return replace(probe, work=work, settle=settle, finished=finished)


def ratios_to(base: Sequence[float], ours: Sequence[float], name: str) -> Figures:
    """Ours over the base's, round by round: median and range, under `name`."""
    return spread(name, [one / other for one, other in zip(ours, base, strict=True)])


def step_figures(rates: tuple[float, ...], batch_size: int) -> Figures:
    """n, milliseconds of a step and views/s, from decoded images/s of each round."""
    views = spread("views_per_s", [rate * VIEWS_PER_DECODED for rate in rates])
    return {"n": len(rates), **spread("step_ms", [2e3 * batch_size / rate for rate in rates]), **views}


def machine(device: torch.device) -> Figures:
    """What the figures were measured on."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor() or platform.machine(),
        "bf16_in_hardware": on_cuda or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": current_commit(),
    }
