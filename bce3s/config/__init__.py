"""What a training run can be told: one tree of frozen dataclasses, overridable by `--set a.b=value`, saved as JSON with the run."""

from __future__ import annotations

from bce3s.config.checkpoint import CheckpointConfig, Interval, parse_interval
from bce3s.config.loss import LossConfig
from bce3s.config.model import CLASSIFIERS, ModelConfig
from bce3s.config.optimizer import OPTIMIZERS, OptimizerConfig
from bce3s.config.retrain import RETRAIN_METHODS, RetrainConfig
from bce3s.config.train import TrainConfig, parse_image_sizes
from bce3s.config.tree import by_path, from_dict, override, to_json

__all__ = [
    "CLASSIFIERS",
    "OPTIMIZERS",
    "RETRAIN_METHODS",
    "CheckpointConfig",
    "Interval",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RetrainConfig",
    "TrainConfig",
    "by_path",
    "from_dict",
    "override",
    "parse_image_sizes",
    "parse_interval",
    "to_json",
]
