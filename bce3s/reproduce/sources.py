"""Whose the published figures are, and how they were measured as far as that is known: one label a source, in every table."""

from __future__ import annotations

from bce3s.reproduce.grid import Published

GLMC = "GLMC, its repository; ResNet-32 four times as wide, 200 epochs, another subset, best on test"
GLMC_MAX_NORM = "GLMC + max-norm, its repository; ResNet-32 four times as wide, another subset, best on test"
PROCO = "ProCo, its repository; ResNet-32, 200 epochs, another subset"
BCE3S_BOTH_STAGES = "BCE3S, paper; both stages; flip TTA and best on test as far as the authors' log shows"
_ABLATION = "paper, second-hand; stage one; flip TTA and best on test as far as the authors' log shows"


def _ablation(many: float, medium: float, few: float, overall: float) -> Published:
    return Published(label=_ABLATION, many=many, medium=medium, few=few, all=overall)


# Fan et al., AAAI 2026, CIFAR100-LT at imbalance factor 100; read in a note on the paper, not in the paper (field.md 2.1).
ABLATION = {
    "ce": _ablation(82.29, 51.37, 15.67, 51.48),
    "bce": _ablation(81.11, 55.06, 17.40, 52.88),
    "contrastive": _ablation(82.74, 56.57, 20.63, 54.95),
    "uniform": _ablation(81.03, 56.51, 19.20, 53.90),
    "bce3s": _ablation(83.34, 57.09, 22.80, 55.99),
    "ce-tsl": _ablation(83.97, 54.54, 18.87, 54.14),
}
