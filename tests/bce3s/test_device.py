"""Which switches of torch a run sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from bce3s.config import TrainConfig
from bce3s.device import apply_numerics, resolve_placement

CONFIG = TrainConfig(dataset="demo", device="cpu")


@pytest.fixture(autouse=True)
def _usual_switches() -> Iterator[None]:
    yield
    apply_numerics(CONFIG)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_a_choice_for_convolutions_and_products_alike(tf32: bool) -> None:
    apply_numerics(replace(CONFIG, tf32=tf32))
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)


def test_deterministic_refuses_kernels_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    apply_numerics(replace(CONFIG, deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    apply_numerics(CONFIG)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.cuda
def test_every_rank_of_a_machine_takes_its_own_device() -> None:
    config = replace(CONFIG, device="auto")
    assert resolve_placement(config).device == torch.device("cuda", 0)
    if torch.cuda.device_count() > 1:
        assert resolve_placement(config, local_rank=1).device == torch.device("cuda", 1)
