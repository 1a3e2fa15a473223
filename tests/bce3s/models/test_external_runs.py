"""Every kind of backbone goes through a whole run: it trains, is saved, resumed and evaluated, compiled, and shared by ranks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bce3s.config import TrainConfig
from bce3s.models import build_recogniser
from bce3s.runlog import read_metrics
from bce3s.train import open_network
from pipelines.config import OrderConfig
from pipelines.types import ConfigError
from tests.bce3s.train.runs import CONFIG, assert_equal_states, train
from tests.bce3s.train.test_ranks import Trial, run_together
from tests.commands import run

needs_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is not installed")
MODULE = "bce3s_test_patches"
SOURCE = """
from torch import nn

class Patches(nn.Module):
    "No batch-norm, images of one size only, and a parameter that is no matrix."

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 16, 4, stride=4)
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(16, 16)

    def forward(self, images):
        patches = self.cut(images).flatten(2).transpose(1, 2)
        return self.mix(self.norm(patches).relu()).mean(1)
"""
ARCHS = [
    "resnet8-cifar",
    f"{MODULE}:Patches",
    pytest.param("resnet18", marks=pytest.mark.slow),
    *(pytest.param(f"timm:test_{name}", marks=needs_timm) for name in ("resnet", "vit", "convnext")),
]


@pytest.fixture(scope="module", autouse=True)
def own_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("own")
    (folder / f"{MODULE}.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop(MODULE, None)


def config_of(arch: str, **changes: Any) -> TrainConfig:
    settings = {"epochs": 1, "ema_decay": 0.9, "channels_last": "on", **changes}
    # ConvNeXt shrinks an image 32 times.
    data = replace(settings.pop("data", CONFIG.data), image_size=32 if arch.startswith("timm:") else 16)
    return replace(CONFIG, model=replace(CONFIG.model, arch=arch), data=data, **settings)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not(make_shards: Any, tmp_path: Path, arch: str) -> None:
    shards, config = make_shards(), config_of(arch)
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    trained = train(config, shards, through)
    train(config, shards, stopped, stop_at=lambda trainer: trainer.state.cursor.global_step >= 2)
    train(config, shards, stopped, resume=True)
    assert_equal_states(through, stopped)
    opened = open_network(stopped, device="cpu")
    images = torch.randn(3, 3, *[config.data.image_size] * 2)
    assert torch.equal(opened.model(images), trained.model.eval()(images))
    assert read_metrics(stopped)[-1]["last_epoch_no_tta"]["num_images"] == 20


@pytest.mark.slow  # what the fast suite sees of it: `test_external.py` imports from the current folder
def test_the_commands_take_a_network_of_ones_own_from_where_they_are_started(make_shards: Any, tmp_path: Path) -> None:
    root = str(make_shards().root)
    (tmp_path / "mine.py").write_text(SOURCE)
    names = ("--arch", "mine:Patches", "--shards", root, "--device", "cpu", "--epochs", "1", "--batch-size", "16", "--out", "run")
    settings = ("data.image_size=16", "data.num_threads=1", "data.loader=resident", "data.augment.crop=resized", "data.augment.policy=none")
    sets = [part for setting in settings for part in ("--set", setting)]
    trained = run("fast-train", "--dataset", "cifar10-lt", *names, *sets, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    measured = run("evaluate", "run", "--device", "cpu", "--quiet", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    (tmp_path / "mine.py").unlink()
    gone = run("evaluate", "run", "--device", "cpu", cwd=tmp_path)
    assert gone.returncode == 2
    assert gone.stderr.endswith("there is no module 'mine'; start where it lies, or put its folder on PYTHONPATH\n")


def test_images_that_grow_are_tried_before_the_first_step(make_shards: Any, tmp_path: Path) -> None:
    config = config_of(f"{MODULE}:Patches", image_sizes="0:12,1:16")
    train(config, make_shards(), tmp_path / "run")
    (tmp_path / "fixed.py").write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 8))")
    sys.path.insert(0, str(tmp_path))
    with pytest.raises(ConfigError, match=r"^arch 'fixed:net' cannot take images of 12 px: RuntimeError: mat1"):
        train(replace(config, model=replace(config.model, arch="fixed:net")), make_shards(), tmp_path / "refused")
    sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    "arch", [f"{MODULE}:Patches", *(pytest.param(f"timm:test_{name}", marks=needs_timm) for name in ("resnet", "vit"))]
)
def test_the_compiler_sees_one_graph(arch: str) -> None:
    config = config_of(arch)
    side = config.data.image_size
    features = build_recogniser(config.model, 4, image_sides=(side,)).features
    images = torch.randn(2, 3, side, side)
    torch.testing.assert_close(torch.compile(features, fullgraph=True, backend="eager")(images), features(images))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [f"{MODULE}:Patches", pytest.param("timm:test_efficientnet", marks=needs_timm)])
def test_ranks_train_what_one_process_trains(make_shards: Any, tmp_path: Path, arch: str) -> None:
    """With batch statistics of all ranks: timm's batch-norms hold their activations, which must not be lost on the way."""
    data = replace(CONFIG.data, order=OrderConfig(drop_last=True))
    optimizer = replace(CONFIG.optimizer, learning_rate=1e-4)
    config = config_of(arch, data=data, optimizer=optimizer, sync_batch_norm=True, ema_decay=0.0)
    root = make_shards().root
    (alone,) = run_together(1, root, tmp_path, Trial(name="alone", run="alone", config=config))["alone"]
    ranks = run_together(2, root, tmp_path, Trial(name="two", run="two", config=config))["two"]
    for name, value in alone["model"].items():
        torch.testing.assert_close(ranks[0]["model"][name], value, rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(ranks[0]["model"][name], ranks[1]["model"][name]), name
