"""The paper's ablation on CIFAR100-LT: each of the three terms as BCE, as CE, or not at all."""

from __future__ import annotations

from bce3s.reproduce.grid import Budget, Claim, Published, Row, Table

_LABEL = "paper, stage one; flip TTA and best on test, as far as the authors' log shows"


def _published(many: float, medium: float, few: float, overall: float) -> Published:
    return Published(label=_LABEL, many=many, medium=medium, few=few, all=overall)


def ablation_cifar100(budget: Budget) -> Table:
    """CIFAR100-LT, imbalance factor 100, stage one (Fan et al., AAAI 2026; figures: method.md, "Published figures")."""
    shards = budget.shards("cifar100-lt")
    tsl = "loss.name=tsl"
    rows = (
        Row(name="ce", title="CE joint", shards=shards, settings=("loss.name=ce",), published=_published(82.29, 51.37, 15.67, 51.48)),
        Row(name="bce", title="BCE joint", shards=shards, settings=("loss.name=bce",), published=_published(81.11, 55.06, 17.40, 52.88)),
        Row(
            name="contrastive",
            title="BCE joint + contrastive",
            shards=shards,
            settings=(tsl, "loss.uniform=off"),
            published=_published(82.74, 56.57, 20.63, 54.95),
        ),
        Row(
            name="uniform",
            title="BCE joint + uniform",
            shards=shards,
            settings=(tsl, "loss.contrastive=off"),
            published=_published(81.03, 56.51, 19.20, 53.90),
        ),
        Row(name="bce3s", title="BCE3S", shards=shards, settings=("loss.name=bce3s",), published=_published(83.34, 57.09, 22.80, 55.99)),
        Row(
            name="ce-tsl",
            title="the three terms as CE",
            shards=shards,
            settings=(tsl, "loss.joint=ce", "loss.contrastive=ce", "loss.uniform=ce"),
            published=_published(83.97, 54.54, 18.87, 54.14),
        ),
    )
    claims = (
        *(Claim("bce", "ce"), Claim("bce", "ce", "few"), Claim("contrastive", "bce"), Claim("uniform", "bce")),
        *(Claim("bce3s", "contrastive"), Claim("bce3s", "uniform"), Claim("bce3s", "bce"), Claim("bce3s", "bce", "few")),
        *(Claim("bce3s", "ce-tsl"), Claim("bce3s", "ce-tsl", "few"), Claim("bce3s", "ce"), Claim("bce3s", "ce", "few")),
    )
    title = "CIFAR100-LT, imbalance factor 100: the terms of BCE3S, stage one"
    return Table(name="ablation-cifar100", title=title, budget=budget, rows=rows, claims=claims)
