"""What a training run can be told: one tree of frozen dataclasses, overridable by `--set a.b=value`, saved as JSON with the run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines.config import DataConfig, require, require_choice
from pipelines.types import ConfigError

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
SWITCHES = ("auto", "on", "off")
SCHEDULES = ("step", "epoch")
OPTIMIZERS = ("sgd", "adamw", "lars")

_INTERVAL = re.compile(r"(\d+)\s*(steps?|epochs?|s|m|h)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}

_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network.

    Args:
        arch: a name of `bce3s.models.ARCHS`.
        projection_dim: P of the projector and the feature memory.
        pretrained: path of a torchvision-format state dict for the backbone; empty trains from scratch.
    """

    arch: str = "resnet32-cifar"
    projection_dim: int = 128
    pretrained: str = ""

    def __post_init__(self) -> None:
        require(self.projection_dim >= 1, f"projection_dim must be at least 1, not {self.projection_dim}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss (method.md; symbols of the paper in brackets).

    Args:
        name: a name of `bce3s.losses.LOSSES`.
        contrastive_weight: of the sample-to-sample term [λ_ss].
        uniform_weight: of the classifier-to-classifier term [λ_cc].
        temperature: of the contrastive term's cosines [τ].
        negative_ratio: share of the K classes that the source view's joint term sees [r]; 1 is all of them.
        logit_clamp: logits are clamped to ± this before softplus.
        contrastive_warmup_epochs: epochs that only fill the feature memory.
        uniform_samples: classes drawn each step for an unbiased estimate of the uniform term; 0 takes all, exactly.
    """

    name: str = "bce3s"
    contrastive_weight: float = 0.1
    uniform_weight: float = 1.0
    temperature: float = 1.0
    negative_ratio: float = 0.4
    logit_clamp: float = 64.0
    contrastive_warmup_epochs: int = 1
    uniform_samples: int = 0

    def __post_init__(self) -> None:
        for name in ("contrastive_weight", "uniform_weight"):
            require(0 <= getattr(self, name) < math.inf, f"{name} cannot be negative or infinite, not {getattr(self, name)}")
        require(self.contrastive_warmup_epochs >= 0, f"contrastive_warmup_epochs cannot be negative, not {self.contrastive_warmup_epochs}")
        require(0 < self.temperature < math.inf, f"temperature must be positive, not {self.temperature}")
        require(0 < self.negative_ratio <= 1, f"negative_ratio must lie in (0, 1], not {self.negative_ratio}")
        require(self.logit_clamp > 0, f"logit_clamp must be positive, not {self.logit_clamp}")
        require(
            self.uniform_samples == 0 or self.uniform_samples >= 2, f"uniform_samples must be 0 or at least 2, not {self.uniform_samples}"
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, with linear warm-up and a cosine to zero.

    Args:
        name: "sgd", "adamw" or "lars" (You et al. 2017).
        learning_rate: peak, for the recipe's batch size.
        momentum: of SGD and LARS; AdamW's first beta.
        beta2: AdamW's second beta.
        warmup_epochs: epochs of linear rise; fractions are allowed.
        schedule: the rate changes every "step" or, as the reference does, every "epoch".
        weight_decay: on every parameter, as the reference has it, unless `decay_norm_and_bias` is off.
        clip_norm: global gradient norm limit in every precision; 0 is off.
    """

    name: str = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    beta2: float = 0.999
    nesterov: bool = False
    weight_decay: float = 5e-3
    decay_norm_and_bias: bool = True
    warmup_epochs: float = 0.0
    schedule: str = "step"
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        require_choice("optimizer", self.name, OPTIMIZERS)
        require_choice("schedule", self.schedule, SCHEDULES)
        require(0 < self.learning_rate < math.inf, f"learning_rate must be positive and finite, not {self.learning_rate}")
        require(0 <= self.weight_decay < math.inf, f"weight_decay cannot be negative or infinite, not {self.weight_decay}")
        require(0 <= self.momentum < 1, f"momentum must lie in [0, 1), not {self.momentum}")
        require(0 <= self.beta2 < 1, f"beta2 must lie in [0, 1), not {self.beta2}")
        require(self.momentum > 0 or not self.nesterov, "nesterov needs a momentum above 0")
        require(self.name == "sgd" or not self.nesterov, f"nesterov is SGD's, not of {self.name}")
        require(self.warmup_epochs >= 0, f"warmup_epochs cannot be negative, not {self.warmup_epochs}")
        require(self.clip_norm >= 0, f"clip_norm cannot be negative, not {self.clip_norm}")


@dataclass(frozen=True)
class Interval:
    """How often: every `count` of `unit`, "epoch", "step" or "s" (seconds of wall-clock)."""

    count: float
    unit: str


def parse_interval(text: str) -> Interval:
    """`500steps`, `2epochs`, `90s`, `10m` or `1h`.

    Raises:
        ConfigError: anything else, or none of them.
    """
    matched = _INTERVAL.fullmatch(text.strip())
    if matched is None or int(matched[1]) < 1:
        raise ConfigError(f"an interval is such as 500steps, 1epoch, 10m or 1h, not '{text}'")
    count, unit = int(matched[1]), matched[2]
    return Interval(count * _SECONDS[unit], "s") if unit in _SECONDS else Interval(count, unit.rstrip("s"))


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
class CheckpointConfig:
    """What survives a kill.

    Args:
        every: how often a run is saved: 500steps, 1epoch, 10m or 1h.
        keep: checkpoints that stay; older ones are deleted once a newer one is safe on disk.
    """

    every: str = "1epoch"
    keep: int = 2

    def __post_init__(self) -> None:
        parse_interval(self.every)
        require(self.keep >= 1, f"keep must be at least 1, not {self.keep}")


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
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("channels_last", self.channels_last, SWITCHES)
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


def to_json(config: Any) -> str:
    """The config tree as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_dict(kind: type[ConfigT], values: dict[str, Any], path: str = "") -> ConfigT:
    """Rebuilds a config tree from `dataclasses.asdict` or JSON.

    Raises:
        ConfigError: an unknown key or a value of the wrong type; names its path.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"unknown setting '{path}{unknown[0]}'; known here: {', '.join(path + name for name in hints)}")
    built = {name: _convert(hints[name], value, f"{path}{name}") for name, value in values.items()}
    return kind(**built)


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ConfigError(
                f"'{path}' is a group of settings; set one of {', '.join(f'{path}.{f.name}' for f in dataclasses.fields(kind))}"
            )
        return from_dict(kind, value, f"{path}.")
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        item_kinds = typing.get_args(kind)
        if len(items) != len(item_kinds):
            raise ConfigError(f"{path} takes {len(item_kinds)} values, not {len(items)}")
        return tuple(_convert(item_kind, item, path) for item_kind, item in zip(item_kinds, items, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path} takes {_KINDS[kind]}, not {value!r}")
    return value


def override(config: ConfigT, assignments: list[str]) -> ConfigT:
    """Applies `a.b=value` assignments; values are JSON, anything else is taken as text, commas make tuples.

    Raises:
        ConfigError: no '=', an unknown path (the known ones are listed) or a value of the wrong type.
    """
    values = dataclasses.asdict(config)  # type: ignore[call-overload]
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set takes path=value, such as --set optimizer.learning_rate=0.1, not '{assignment}'")
        *groups, name = path.strip().split(".")
        target = values
        for group in groups:
            target = target.get(group) if isinstance(target, dict) else None
        if not isinstance(target, dict) or name not in target:
            raise ConfigError(f"unknown setting '{path}'; known: {', '.join(by_path(values))}")
        if isinstance(target[name], dict):
            raise ConfigError(f"'{path}' is a group of settings; set one of {', '.join(by_path(target[name], path + '.'))}")
        target[name] = _parse(text, target[name])
    return from_dict(type(config), values)


def _parse(text: str, current: Any) -> Any:
    if isinstance(current, (list, tuple)):
        return [_parse(part, current[0]) for part in text.strip("[]() ").split(",")]
    if isinstance(current, str):
        return text
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def by_path(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a config tree, such as `dataclasses.asdict` or its JSON gives, by their full names: {"data.order.sampling": …}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= by_path(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
