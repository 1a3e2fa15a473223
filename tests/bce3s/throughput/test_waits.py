"""Waiting for data while training: counted where it happens, and said in one line when it binds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bce3s.throughput.waits import DataWaits, Occupancy, binding_sentence
from pipelines.config import DataConfig
from pipelines.loaders import LoaderChoice

CPU = torch.device("cpu")


class Clock:
    """Time passes only where the test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def batches(self, times_s: list[float]) -> Iterator[int]:
        for number, time_s in enumerate(times_s):
            self.now_s += time_s
            yield number


def drawn(times_s: list[float], step_s: float) -> DataWaits[int]:
    clock = Clock()
    waits = DataWaits(clock.batches(times_s), CPU, clock)
    for _ in waits:
        clock.now_s += step_s
    return waits


def test_a_slow_loader_takes_its_share_of_the_time() -> None:
    found = drawn([0.03] * 5, step_s=0.01).total()
    assert found.data_wait_share == pytest.approx(0.75)
    assert found.ready_share == 0


def test_a_loader_that_is_ahead_costs_nothing() -> None:
    assert drawn([0.0] * 5, step_s=0.02).total() == Occupancy(data_wait_share=0.0, ready_share=1.0)


def test_recent_counts_since_the_last_call_and_total_counts_all() -> None:
    clock = Clock()
    waits = DataWaits(clock.batches([0.03, 0.03, 0.0, 0.0]), CPU, clock)
    shares = []
    for number in waits:
        if number == 2:
            shares.append(waits.recent().ready_share)
        clock.now_s += 0.02
    shares.append(waits.recent().ready_share)
    assert shares == [0.0, 1.0]
    assert waits.total().ready_share == 0.5


def test_a_real_wait_is_seen_by_the_real_clock() -> None:
    def slow() -> Iterator[int]:
        time.sleep(0.2)
        yield 0

    waits = DataWaits(slow(), CPU)
    assert list(waits) == [0]
    assert waits.total().data_wait_share > 0.9


def test_nothing_drawn_is_nothing_waited_for() -> None:
    assert DataWaits(iter(()), CPU).total() == Occupancy(data_wait_share=0.0, ready_share=1.0)


@pytest.mark.parametrize(
    ("choice", "config", "stored_side", "knob"),
    [
        (LoaderChoice(name="dali", reason="", resident_fits=True), DataConfig(), 500, "take --loader resident, for the decoded set fits"),
        (LoaderChoice(name="dali", reason=""), DataConfig(num_threads=1), 500, "by --set data.num_threads=0"),
        (LoaderChoice(name="ffcv", reason=""), DataConfig(image_size=224), 500, "make_shards.py --min-side 256"),
        (LoaderChoice(name="dali", reason=""), DataConfig(image_size=224), 256, "decoding needs more cores"),
        (LoaderChoice(name="webdataset", reason="", streamed=True), DataConfig(), 500, "raise --set data.stream.buffer_bytes"),
        (LoaderChoice(name="resident", reason="", resident_fits=True), DataConfig(), 500, "lighten the augmentation"),
    ],
)
def test_a_binding_loader_is_named_with_a_knob_that_turns(
    choice: LoaderChoice, config: DataConfig, stored_side: float, knob: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    sentence = binding_sentence(Occupancy(data_wait_share=0.34, ready_share=0.2), choice, config, stored_side)
    assert sentence is not None
    assert sentence.startswith(f"data binds: 34% of the epoch went by waiting for loader '{choice.name}', 20% of its batches were ready; ")
    assert knob in sentence
    assert sentence.endswith("'bce3s profile' measures every part")
    assert binding_sentence(Occupancy(data_wait_share=0.09, ready_share=0.9), choice, config, stored_side) is None


@pytest.mark.cuda
def test_on_cuda_only_an_idle_device_counts_as_waiting() -> None:
    """The host waits for each batch while the device is still busy with long kernels: no stall."""

    def slow() -> Iterator[int]:
        for number in range(10):
            time.sleep(0.002)
            yield number

    device = torch.device("cuda", 0)
    matrix = torch.randn(8192, 8192, device=device)
    waits: Any = DataWaits(slow(), device)
    for _ in waits:
        for _ in range(10):
            matrix = matrix @ matrix
            matrix /= matrix.norm()
    torch.cuda.synchronize()
    assert waits.total().data_wait_share < 0.3


@pytest.mark.cuda
def test_on_cuda_a_batch_that_the_device_is_yet_to_decode_counts_as_waiting() -> None:
    """The host has each batch at once, but the training stream has to wait for another stream's work."""
    device = torch.device("cuda", 0)
    decoding, matrix = torch.cuda.Stream(), torch.randn(8192, 8192, device=device)

    def decoded() -> Iterator[int]:
        for number in range(10):
            with torch.cuda.stream(decoding):
                for _ in range(10):
                    torch.mm(matrix, matrix)
            torch.cuda.current_stream().wait_stream(decoding)
            yield number

    waits: Any = DataWaits(decoded(), device)
    for _ in waits:
        matrix[:64].sum()
    torch.cuda.synchronize()
    assert waits.total().data_wait_share > 0.5
