"""The paper's ablation on CIFAR100-LT: each of the three terms as BCE, as CE, or not at all."""

from __future__ import annotations

from bce3s.reproduce.grid import Budget, Claim, Row, Table
from bce3s.reproduce.sources import ABLATION

_TSL = "loss.name=tsl"
_ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("ce", "CE joint", ("loss.name=ce",)),
    ("bce", "BCE joint", ("loss.name=bce",)),
    ("contrastive", "BCE joint + contrastive", (_TSL, "loss.uniform=off")),
    ("uniform", "BCE joint + uniform", (_TSL, "loss.contrastive=off")),
    ("bce3s", "BCE3S", ("loss.name=bce3s",)),
    ("ce-tsl", "the three terms as CE", (_TSL, "loss.joint=ce", "loss.contrastive=ce", "loss.uniform=ce")),
)


def ablation_cifar100(budget: Budget) -> Table:
    """CIFAR100-LT, imbalance factor 100, stage one (Fan et al., AAAI 2026; figures: `sources.ABLATION`)."""
    shards = budget.shards("cifar100-lt")
    rows = tuple(Row(name=name, title=title, shards=shards, settings=settings, published=ABLATION[name]) for name, title, settings in _ROWS)
    claims = (
        *(Claim("bce", "ce"), Claim("bce", "ce", "few"), Claim("contrastive", "bce"), Claim("uniform", "bce")),
        *(Claim("bce3s", "contrastive"), Claim("bce3s", "uniform"), Claim("bce3s", "bce"), Claim("bce3s", "bce", "few")),
        *(Claim("bce3s", "ce-tsl"), Claim("bce3s", "ce-tsl", "few"), Claim("bce3s", "ce"), Claim("bce3s", "ce", "few")),
    )
    title = "CIFAR100-LT, imbalance factor 100: the terms of BCE3S, stage one"
    return Table(name="ablation-cifar100", title=title, budget=budget, rows=rows, claims=claims)
