"""The recipe of the embedded demo set."""

from __future__ import annotations

from bce3s.config import ModelConfig, OptimizerConfig, RetrainConfig, TrainConfig
from pipelines.config import AugmentConfig, DataConfig


def demo_resnet20_12ep() -> TrainConfig:
    """The embedded demo set, sized for two CPU cores and a minute or two; shows the whole path, claims nothing. Figures: README."""
    return TrainConfig(
        dataset="demo",
        epochs=12,
        data=DataConfig(loader="dali", batch_size=32, image_size=32, augment=AugmentConfig(area_range=(0.5, 1.0), eval_crop=1.0)),
        model=ModelConfig(arch="resnet20-cifar", projection_dim=64),
        optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=5e-4, warmup_epochs=1),
        retrain=RetrainConfig(epochs=10),
    )
