"""`--loader auto`: what is taken for which set and memory, and why."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import AugmentConfig, DataConfig, ResidentConfig
from pipelines.loaders import build_loader, choice, choose_loader
from pipelines.loaders.choice import decoded_bytes, free_bytes
from pipelines.types import ConfigError

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
PHOTOS = DataConfig(image_size=224, batch_size=8, augment=AugmentConfig())


def test_a_set_that_fits_decoded_is_resident(make_shards: Any) -> None:
    found = choose_loader(DataConfig(augment=AugmentConfig(crop="pad")), make_shards(), CPU)
    assert found.name == "resident"
    assert found.resident_fits
    assert re.fullmatch(r"the decoded set takes 0 MiB, less than half of the \d+ GiB free on the host", found.reason)


def test_a_set_that_does_not_fit_is_decoded_by_dali(make_shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards()
    needed = decoded_bytes(shards, PHOTOS)
    monkeypatch.setattr(choice, "free_bytes", lambda device: 2 * needed)
    assert choose_loader(PHOTOS, shards, CPU).name == "resident"
    monkeypatch.setattr(choice, "free_bytes", lambda device: 2 * needed - 1)
    found = choose_loader(PHOTOS, shards, CPU)
    assert (found.name, found.resident_fits) == ("dali", False)
    assert found.reason == "the decoded set takes 0 MiB, more than half of the 0 GiB free on the host"


def test_one_that_was_asked_for_is_taken(make_shards: Any) -> None:
    found = choose_loader(DataConfig(loader="synthetic"), make_shards(), CPU)
    assert (found.name, found.reason) == ("synthetic", "as configured")


def test_decoded_bytes_count_all_splits_and_never_enlarge(make_shards: Any) -> None:
    small = make_shards()
    assert decoded_bytes(small, PHOTOS) == (74 + 20) * 32 * 32 * 3
    large = make_shards(size=(80, 60), extension="jpg")
    config = DataConfig(resident=ResidentConfig(min_side=30))
    assert decoded_bytes(large, config) == (74 + 20) * 40 * 30 * 3


def test_free_memory_of_the_host_is_plausible() -> None:
    assert 1 << 26 < free_bytes(CPU) < 1 << 46


def test_an_unknown_loader_is_refused_before_anything_is_chosen(make_shards: Any) -> None:
    with pytest.raises(ConfigError, match="unknown loader 'torch'; known: auto, "):
        build_loader(make_shards(), "train", DataConfig(loader="torch"), seed=0, device=CPU)


WITHOUT_DALI = """
import sys
sys.modules["nvidia"] = None  # what Python itself does for a package that must not be found
from pathlib import Path
import torch
from pipelines.config import AugmentConfig, DataConfig
from pipelines.format import open_shards
from pipelines.loaders import build_loader, choose_loader
from pipelines.types import BackendError
shards, device = open_shards(Path(sys.argv[1])), torch.device("cpu")
for loader in ("dali", "resident", "webdataset", "cached"):
    try:
        build_loader(shards, "train", DataConfig(loader=loader, image_size=32, batch_size=8), seed=0, device=device)
    except BackendError as error:
        print(loader, error)
print(choose_loader(DataConfig(), shards, device))
"""


def test_without_dali_every_loader_that_needs_it_is_one_sentence_and_auto_takes_ffcv(make_shards: Any) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    shards = make_shards(size=(48, 48), extension="jpg", beton=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_DALI, str(shards.root)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    *refused, chosen = found.stdout.splitlines()
    assert [line.split()[0] for line in refused] == ["dali", "resident", "webdataset", "cached"]
    for line in refused:
        assert "this loader needs NVIDIA DALI, which cannot be imported here" in line
        assert "run 'pip install nvidia-dali-cuda130', or take --loader ffcv" in line
    assert chosen.startswith("LoaderChoice(name='ffcv', reason='DALI is not installed'")
