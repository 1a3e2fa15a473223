"""One training run: the tree of all settings."""

from __future__ import annotations

from dataclasses import dataclass

from bce3s.config.checkpoint import CheckpointConfig
from bce3s.config.loss import LossConfig
from bce3s.config.model import ModelConfig
from bce3s.config.optimizer import OptimizerConfig
from bce3s.config.retrain import RetrainConfig
from pipelines.config import DataConfig, require, require_choice
from pipelines.types import ConfigError

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
SWITCHES = ("auto", "on", "off")
SELECTIONS = ("last", "val")


def parse_image_sizes(text: str) -> dict[int, int]:
    """`0:128,30:160` as {first epoch: side in pixels}, ascending; empty text is empty.

    Raises:
        ConfigError: not of that form, no size for epoch 0, or epochs that do not ascend.
    """
    try:
        sizes = {int(epoch): int(side) for epoch, side in (part.split(":") for part in text.split(",") if part)}
    except ValueError:
        raise ConfigError(f"image_sizes is such as 0:128,30:160 (first epoch:side), not '{text}'") from None
    epochs = list(sizes)
    if sizes and (epochs[0] != 0 or epochs != sorted(epochs) or min(sizes.values()) < 8 or text.count(":") != len(sizes)):
        raise ConfigError(f"image_sizes starts at epoch 0 and ascends, with sides of at least 8 px, such as 0:128,30:160, not '{text}'")
    return sizes


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Args:
        dataset: name the shards must have been made from.
        precision: "auto" is bf16 where the device has it in hardware, else fp32.
        tf32: on CUDA, let fp32 convolutions and matrix products round their inputs to 10 bits of mantissa.
        channels_last: "auto" is on: measured faster on a CPU (docs/log.md), not yet on a GPU.
        compile: torch.compile the network.
        cuda_graphs: replay the whole step as one CUDA graph for each shape and phase of the loss; not yet measured, so off.
        deterministic: only kernels that give the same bits each time (docs/reliability.md has the cost).
        accumulate_steps: micro-batches that a batch is cut into, whose gradients are summed; batch-norm sees one at a time.
        ema_decay: of an exponential moving average of the weights, evaluated beside them; 0 is off.
        sync_batch_norm: batch statistics over all ranks.
        image_sizes: sides by first epoch, such as 0:128,30:160, for training; empty is data.image_size throughout.
        device: "auto" is the first CUDA device, else the CPU.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        log_every: steps between lines of the metrics log.
        select: which epoch's weights are the run's result: the "last", or the best on the "val" split, where there is one; never on test.
        retrain: stage two, where it is asked for.
    """

    dataset: str
    epochs: int = 200
    seed: int = 0
    precision: str = "auto"
    tf32: bool = True
    channels_last: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    deterministic: bool = False
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    sync_batch_norm: bool = False
    image_sizes: str = ""
    device: str = "auto"
    eval_every: int = 1
    log_every: int = 20
    select: str = "last"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    retrain: RetrainConfig = RetrainConfig()

    def __post_init__(self) -> None:
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("channels_last", self.channels_last, SWITCHES)
        require_choice("select", self.select, SELECTIONS)
        require(0 <= self.seed < 1 << 63, f"seed must lie in [0, 2^63), not {self.seed}")
        require(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), not {self.ema_decay}")
        require(
            self.accumulate_steps >= 1 and self.data.batch_size % self.accumulate_steps == 0,
            f"accumulate_steps must divide the batch size {self.data.batch_size}, and {self.accumulate_steps} does not",
        )
        growing = bool(parse_image_sizes(self.image_sizes))
        require(not growing or self.data.augment.crop != "pad", "image_sizes needs crops of any size; take --set data.augment.crop=resized")
        for name in ("epochs", "eval_every", "log_every"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
