"""Waiting for data while training: counted where it happens, and said in one line when it binds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bce3s.throughput.waits import DataWaits, Occupancy, binding_sentence
from pipelines.loaders import LOADERS, LoaderChoice

CPU = torch.device("cpu")


def batches(times_s: list[float]) -> Iterator[int]:
    for number, time_s in enumerate(times_s):
        time.sleep(time_s)
        yield number


def drawn(times_s: list[float], step_s: float) -> DataWaits[int]:
    waits = DataWaits(batches(times_s), CPU)
    for _ in waits:
        time.sleep(step_s)
    return waits


def test_a_slow_loader_takes_its_share_of_the_time() -> None:
    found = drawn([0.03] * 5, step_s=0.01).total()
    assert 0.6 < found.data_wait_share < 0.85
    assert found.ready_share == 0


def test_a_loader_that_is_ahead_costs_nothing() -> None:
    found = drawn([0.0] * 5, step_s=0.02).total()
    assert found.data_wait_share < 0.05
    assert found.ready_share == 1


def test_recent_counts_since_the_last_call_and_total_counts_all() -> None:
    waits = DataWaits(batches([0.03, 0.03, 0.0, 0.0]), CPU)
    shares = []
    for number in waits:
        if number == 2:
            shares.append(waits.recent().ready_share)
        time.sleep(0.02)
    shares.append(waits.recent().ready_share)
    assert shares == [0.0, 1.0]
    assert waits.total().ready_share == 0.5


def test_nothing_drawn_is_nothing_waited_for() -> None:
    assert DataWaits(batches([]), CPU).total() == Occupancy(data_wait_share=0.0, ready_share=1.0)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("fits", [True, False])
def test_a_binding_loader_is_named_with_a_knob(loader: str, fits: bool) -> None:
    choice = LoaderChoice(name=loader, reason="", resident_fits=fits)
    sentence = binding_sentence(Occupancy(data_wait_share=0.34, ready_share=0.2), choice)
    assert sentence is not None
    assert sentence.startswith(f"data binds: 34% of the epoch went by waiting for loader '{loader}', 20% of its batches were ready; ")
    assert ("take --loader resident" in sentence) == (fits and loader != "resident")
    assert sentence.endswith("'bce3s profile' measures every part")
    assert binding_sentence(Occupancy(data_wait_share=0.09, ready_share=0.9), choice) is None


@pytest.mark.cuda
def test_on_cuda_only_an_idle_device_counts_as_waiting() -> None:
    """The host waits for each batch while the device is still busy with a long kernel: no stall."""
    device = torch.device("cuda", 0)
    matrix = torch.randn(8192, 8192, device=device)
    waits: Any = DataWaits(batches([0.002] * 10), device)
    for _ in waits:
        for _ in range(10):
            matrix = matrix @ matrix
            matrix /= matrix.norm()
    torch.cuda.synchronize()
    assert waits.total().data_wait_share < 0.3
