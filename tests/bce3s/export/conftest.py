from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bce3s.config import RetrainConfig
from bce3s.export.plain import Export
from bce3s.export.write import Written
from tests.bce3s.export.exports import opened_for_export, with_network, write
from tests.bce3s.retrain.stages import STAGE_ONE, retrain
from tests.bce3s.train.runs import train
from tests.conftest import MakeShards


@pytest.fixture(scope="session")
def home(make_shards: MakeShards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run, which kept an average of its weights, and its stage two by LWS; tests add exports."""
    folder = tmp_path_factory.mktemp("home")
    train(replace(STAGE_ONE, ema_decay=0.5), make_shards(), folder / "run")
    retrain(folder / "run", make_shards(), folder / "run" / "stage2-lws", RetrainConfig(method="lws", epochs=1, batch_size=16))
    return folder


@pytest.fixture(scope="session")
def run(home: Path) -> Path:
    return home / "run"


@pytest.fixture(scope="session")
def export(run: Path) -> Export:
    return opened_for_export(run)


@pytest.fixture(scope="session")
def resnet18(export: Export) -> Export:
    """What torchvision and timm have too: the same run with another network."""
    return with_network(export, "resnet18")


@pytest.fixture(scope="session")
def written(export: Export, resnet18: Export, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Written, Export]]:
    """A format, written and checked once for all tests, and what it was made of; read only."""
    made: dict[str, tuple[Written, Export]] = {}

    def get(name: str) -> tuple[Written, Export]:
        if name not in made:
            source = resnet18 if name in ("timm", "torchvision-state-dict") else export
            made[name] = write(source, name, tmp_path_factory.mktemp(name)), source
        return made[name]

    return get
