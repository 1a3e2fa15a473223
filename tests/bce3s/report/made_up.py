"""Findings of made-up runs: of any number of classes, with the names one wishes, without a second of training."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bce3s.metrics import Calibration, FeatureStatistics, accuracy_from_counts
from bce3s.report.cosine_blocks import cosine_pictures
from bce3s.report.findings import ConfusedPair, EpochPoint, Findings, Measured, Note, RunFindings, StepPoint, Thumbnail

HOSTILE = "<script>alert('x')</script>"
LONG = "a-name-that-never-ends-" * 8


def findings(*runs: RunFindings) -> Findings:
    return Findings(runs=runs, seeds=())


def made_up(name: str = "bce3s-s0", num_classes: int = 10, *, seed: int = 0, epochs: int = 5, measured: bool = True) -> RunFindings:
    """A finished run on a long tail from 5,000 images to 5, whose smaller classes are right less often."""
    rng = np.random.default_rng(seed)
    counts_K = np.geomspace(5000, 5, num_classes).round().astype(np.int64)
    totals_K = np.full(num_classes, 50, dtype=np.int64)
    rights_K = (totals_K * np.linspace(0.95, 0.05, num_classes) * rng.uniform(0.85, 1.0, num_classes)).astype(np.int64)
    calibration = _calibration()
    accuracy = accuracy_from_counts(rights_K, totals_K, counts_K, calibration)
    figures = accuracy.headline()
    names = (HOSTILE, LONG, *(f"class {k}" for k in range(2, num_classes)))
    return RunFindings(
        **{"name": name, "folder": Path("runs") / name, "title": "BCE3S, resnet8-cifar, cifar10-lt", "dataset": "cifar10-lt"},
        **{"method": "bce3s", "arch": "resnet8-cifar", "retrained_with": "", "stage": 1, "seed": seed, "complete": True},
        **{"split": "test", "headline": "last_epoch_no_tta", "selected_by": None, "num_images": int(totals_K.sum())},
        measurements={"last_epoch_no_tta": figures, "last_epoch_flip_tta": figures, "best_on_test_no_tta": figures},
        measurement_epochs={"best_on_test_no_tta": epochs},
        class_names=names,
        class_counts_K=tuple(counts_K.tolist()),
        imbalance_factor=float(counts_K.max() / counts_K.min()),
        per_class_K=accuracy.per_class,
        calibration=calibration,
        features=None,
        steps=tuple(_step(i, epochs, rng) for i in range(min(20 * epochs, 1000))),
        epochs=tuple(_epoch(epoch, epochs, figures) for epoch in range(1, epochs + 1)),
        loss_floors={"uniform": 6.0},
        config={"epochs": epochs, "seed": seed, "loss": {"name": "bce3s", "temperature": 1.0}},
        environment={"python": "3.11.7", "gpu": None, "versions": {"torch": "2.13.0"}},
        command=f"bce3s fast-train --dataset cifar10-lt --seed {seed}",
        measured=_measured(num_classes, counts_K, accuracy, seed) if measured else None,
        notes=(Note(section="throughput", sentence="The log does not say how much memory the device had."),),
    )


def without_results(run: RunFindings) -> RunFindings:
    """One that has just begun: nothing but its settings."""
    nothing: dict[str, Any] = {"headline": "", "measurements": {}, "measurement_epochs": {}, "num_images": None, "split": ""}
    nothing |= {"per_class_K": (), "calibration": None, "features": None, "steps": (), "epochs": (), "measured": None, "complete": False}
    nothing |= {"class_names": (), "class_counts_K": (), "imbalance_factor": None, "command": "", "loss_floors": {}}
    return replace(run, **nothing, notes=(Note(section="headline", sentence="It has no result yet."),))


def _step(i: int, epochs: int, rng: np.random.Generator) -> StepPoint:
    terms = {"total": 9 - i / 100, "joint": 2 - i / 100, "uniform": 6.5 - i / 1000}
    rates = {"images_per_s": 400 + 50 * rng.random(), "views_per_s": 1200.0, "data_wait_share": 0.02 * rng.random()}
    return StepPoint(epoch=(i + 1) / 20, terms=terms, device_memory_bytes=2.0**31, **rates)


def _epoch(epoch: int, epochs: int, figures: dict[str, float | None]) -> EpochPoint:
    accuracies = {name: None if value is None else value * epoch / epochs for name, value in figures.items()}
    terms = {"total": 9 - epoch / 5, "joint": 2 - epoch / 5, "uniform": 6.5 - epoch / 50}
    return EpochPoint(epoch=epoch, split="test", accuracies=accuracies, terms=terms, images_per_s=420.0, data_wait_share=0.01, train_s=12.0)


def _calibration() -> Calibration:
    confidences = tuple(None if m < 3 else (m + 0.5) / 15 for m in range(15))
    accuracies = tuple(None if c is None else 0.7 * c for c in confidences)
    counts = tuple(0 if c is None else 10 * m for m, c in enumerate(confidences))
    return Calibration(ece=21.5, confidence="sigmoid", bin_counts=counts, bin_accuracy=accuracies, bin_confidence=confidences)


def _measured(num_classes: int, counts_K: np.ndarray, accuracy: Any, seed: int) -> Measured:
    torch.manual_seed(seed)
    rows_KD = torch.randn(num_classes, 16)
    statistics = FeatureStatistics(num_classes, 16, torch.device("cpu"))
    labels = torch.arange(num_classes).repeat(3)
    statistics.add(rows_KD.relu()[labels] + 0.3 * torch.rand(len(labels), 16), labels)
    pictures = cosine_pictures(rows_KD, counts_K)
    histogram, cosine_map = pictures or (None, None)
    return Measured(
        **{"checkpoint": "last epoch (5)", "split": "test", "accuracy": accuracy, "took_s": 1.0},
        geometry=statistics.geometry(rows_KD, counts_K),
        **{"histogram": histogram, "cosine_map": cosine_map},
        confused=(
            ConfusedPair(
                true_class=1, predicted_class=0, count=40, share=0.8, mistaken=(_thumbnail("a class 1"),), example=_thumbnail("ex")
            ),
            ConfusedPair(true_class=0, predicted_class=1, count=3, share=0.06, mistaken=(), example=None),
        ),
    )


def _thumbnail(alt: str) -> Thumbnail:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (90, 140, 200)).save(buffer, "JPEG")
    return Thumbnail(jpeg=buffer.getvalue(), width_px=32, height_px=32, alt=f'{alt} "{HOSTILE}"')
