"""`--loader auto`: what is taken for which set and memory, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines.config import AugmentConfig, DataConfig, ResidentConfig
from pipelines.loaders import build_loader, choice, choose_loader
from pipelines.loaders.choice import decoded_bytes, free_bytes
from pipelines.types import ConfigError

CPU = torch.device("cpu")
PHOTOS = DataConfig(image_size=224, batch_size=8, augment=AugmentConfig())


def test_a_set_that_fits_decoded_is_resident(make_shards: Any) -> None:
    found = choose_loader(DataConfig(augment=AugmentConfig(crop="pad")), make_shards(), CPU)
    assert found.name == "resident"
    assert found.resident_fits
    assert found.reason.startswith("decoded, the set has 0 MiB, of ")
    assert found.reason.endswith(" GiB free on the host")


def test_a_set_that_does_not_fit_is_decoded_by_dali(make_shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards()
    needed = decoded_bytes(shards, PHOTOS)
    monkeypatch.setattr(choice, "free_bytes", lambda device: 2 * needed)
    assert choose_loader(PHOTOS, shards, CPU).name == "resident"
    monkeypatch.setattr(choice, "free_bytes", lambda device: 2 * needed - 1)
    found = choose_loader(PHOTOS, shards, CPU)
    assert (found.name, found.resident_fits) == ("dali", False)
    assert "too much of 0 GiB free on the host" in found.reason


def test_one_that_was_asked_for_is_taken(make_shards: Any) -> None:
    found = choose_loader(DataConfig(loader="synthetic"), make_shards(), CPU)
    assert (found.name, found.reason) == ("synthetic", "asked for")


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
