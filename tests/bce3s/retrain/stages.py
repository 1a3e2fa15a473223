"""A small trained run that stage two starts from, and one stage two of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bce3s.config import ModelConfig, RetrainConfig
from bce3s.retrain.stage_one import StageOne, load_stage_one
from bce3s.retrain.stage_two import StageTwo
from pipelines.format import ShardSet
from tests.bce3s.train.runs import CONFIG, console, train

STAGE_ONE = replace(CONFIG, epochs=2, model=ModelConfig(arch="resnet8-cifar", projection_dim=8))
RETRAIN = RetrainConfig(epochs=3, batch_size=16, learning_rate=0.05)


def train_stage_one(shards: ShardSet, out: Path, classifier: str = "auto") -> Path:
    train(replace(STAGE_ONE, model=replace(STAGE_ONE.model, classifier=classifier)), shards, out)
    return out


def stage_one_of(run: Path, shards: ShardSet) -> StageOne:
    return load_stage_one(run, "last", shards, "cpu")


def retrain(run: Path, shards: ShardSet, out: Path, config: RetrainConfig = RETRAIN) -> StageTwo:
    stage_two = StageTwo(stage_one_of(run, shards), config, console())
    stage_two.run(out)
    return stage_two
