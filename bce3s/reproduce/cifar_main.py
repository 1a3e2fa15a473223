"""BCE3S, CE and BCE on CIFAR10-LT and CIFAR100-LT at three imbalance factors, with the peers' published figures."""

from __future__ import annotations

from bce3s.reproduce.grid import LAST, STAGE_TWO, Budget, Claim, Published, Row, Table

_OURS = "BCE3S, paper; both stages, flip TTA, best on test"
_PAPER = {("cifar10-lt", 100): 90.08, ("cifar100-lt", 100): 59.50, ("cifar100-lt", 50): 65.23, ("cifar100-lt", 10): 76.13}
_GLMC = "GLMC, its repository; ResNet-32 four times as wide, 200 epochs, another subset, best on test"
_GLMC_MAX_NORM = "GLMC + max-norm, its repository; ResNet-32 four times as wide, another subset, best on test"
_PROCO = "ProCo, its repository; ResNet-32, 200 epochs, another subset"
_PEERS: tuple[tuple[str, str, str, tuple[float, float, float]], ...] = (
    ("glmc", _GLMC, "cifar10-lt", (88.50, 91.04, 94.87)),
    ("glmc", _GLMC, "cifar100-lt", (57.97, 63.78, 73.40)),
    ("glmc-max-norm", _GLMC_MAX_NORM, "cifar10-lt", (89.58, 92.04, 95.00)),
    ("glmc-max-norm", _GLMC_MAX_NORM, "cifar100-lt", (58.41, 64.57, 74.28)),
    ("proco", _PROCO, "cifar10-lt", (85.9, 88.2, 91.9)),
    ("proco", _PROCO, "cifar100-lt", (52.8, 57.1, 65.5)),
)
_FACTORS = (100, 50, 10)
_TITLES = {"ce": "CE", "bce": "BCE", "bce3s": "BCE3S"}


def cifar_main(budget: Budget) -> Table:
    """The paper's main table for CIFAR (method.md, "Published figures"; the peers' from their repositories, field.md 2.2 and 2.3).

    BCE3S has both stages and its headline is stage two's, CE and BCE are stage one. The small budget has CIFAR10-LT at factor 100 only.
    """
    small = budget.name == "small"
    sets = [("cifar10-lt", 100)] if small else [(dataset, factor) for dataset in budget.recipes for factor in _FACTORS]
    rows, claims = [], []
    for dataset, factor in sets:
        short = f"{dataset.removesuffix('-lt').replace('cifar', 'c')}-if{factor}"
        where = f"{dataset.removesuffix('-lt').upper()}-LT, factor {factor}"
        for loss, title in _TITLES.items():
            both = loss == "bce3s"
            paper = _PAPER.get((dataset, factor)) if both else None
            rows.append(
                Row(
                    name=f"{loss}-{short}",
                    title=f"{where}: {title}" + (", both stages" if both else ""),
                    shards=budget.shards(dataset, factor),
                    settings=(f"loss.name={loss}",),
                    stages=2 if both else 1,
                    headline=STAGE_TWO + LAST if both else LAST,
                    published=None if paper is None else Published(label=_OURS, all=paper),
                )
            )
        rows += _peers(dataset, factor, short, where)
        claims += [Claim(f"bce3s-{short}", f"{loss}-{short}") for loss in ("ce", "bce")]
    notes = ("The small budget has one of the six sets: CIFAR10-LT at factor 100.",) if small else ()
    return Table(
        name="cifar-main",
        title="CIFAR10-LT and CIFAR100-LT: BCE3S with both stages",
        budget=budget,
        rows=tuple(rows),
        claims=tuple(claims),
        notes=notes,
    )


def _peers(dataset: str, factor: int, short: str, where: str) -> list[Row]:
    return [
        Row(
            name=f"{name}-{short}",
            title=f"{where}: {label.partition(',')[0]}",
            published=Published(label=label, all=figures[_FACTORS.index(factor)]),
        )
        for name, label, of, figures in _PEERS
        if of == dataset
    ]
