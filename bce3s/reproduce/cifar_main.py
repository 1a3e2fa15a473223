"""BCE3S, CE and BCE on CIFAR10-LT and CIFAR100-LT at three imbalance factors, with the peers' published figures."""

from __future__ import annotations

from bce3s.reproduce.grid import LAST, STAGE_TWO, Budget, Claim, Published, Row, ShardsOf, Table
from bce3s.reproduce.sources import BCE3S_BOTH_STAGES, GLMC, GLMC_MAX_NORM, PROCO

_PAPER = {("cifar10-lt", 100): 90.08, ("cifar100-lt", 100): 59.50, ("cifar100-lt", 50): 65.23, ("cifar100-lt", 10): 76.13}
_PEERS: tuple[tuple[str, str, str, tuple[float, float, float]], ...] = (
    ("glmc", GLMC, "cifar10-lt", (88.50, 91.04, 94.87)),
    ("glmc", GLMC, "cifar100-lt", (57.97, 63.78, 73.40)),
    ("glmc-max-norm", GLMC_MAX_NORM, "cifar10-lt", (89.58, 92.04, 95.00)),
    ("glmc-max-norm", GLMC_MAX_NORM, "cifar100-lt", (58.41, 64.57, 74.28)),
    ("proco", PROCO, "cifar10-lt", (85.9, 88.2, 91.9)),
    ("proco", PROCO, "cifar100-lt", (52.8, 57.1, 65.5)),
)
_FACTORS = (100, 50, 10)
_TITLES = {"ce": "CE", "bce": "BCE", "bce3s": "BCE3S"}


def cifar_main(budget: Budget) -> Table:
    """The paper's main table for CIFAR (method.md, "Published figures"; the peers' from their repositories, field.md 2.2 and 2.3).

    Stage one of BCE3S is judged against CE and BCE, which are stage one too; both stages are measured on its runs, and judged against it.
    The small budget has CIFAR10-LT at factor 100 only.
    """
    small = budget.name == "small"
    sets = [("cifar10-lt", 100)] if small else [(dataset, factor) for dataset in budget.recipes for factor in _FACTORS]
    rows, claims = [], []
    for dataset, factor in sets:
        short = f"{dataset.removesuffix('-lt').replace('cifar', 'c')}-if{factor}"
        where = f"{dataset.removesuffix('-lt').upper()}-LT, factor {factor}"
        shards, paper = budget.shards(dataset, factor), _PAPER.get((dataset, factor))
        rows += [
            Row(name=f"{loss}-{short}", title=f"{where}: {title}", shards=shards, settings=(f"loss.name={loss}",))
            for loss, title in _TITLES.items()
        ]
        rows += [_both_stages(short, where, shards, paper), *_peers(dataset, factor, short, where)]
        claims += [Claim(f"bce3s-{short}", f"{loss}-{short}") for loss in ("ce", "bce")]
        claims.append(Claim(f"both-stages-{short}", f"bce3s-{short}"))
    notes = ("The small budget has one of the six sets: CIFAR10-LT at factor 100.",) if small else ()
    return Table(
        name="cifar-main",
        title="CIFAR10-LT and CIFAR100-LT: CE, BCE and BCE3S, and BCE3S with both stages",
        budget=budget,
        rows=tuple(rows),
        claims=tuple(claims),
        notes=notes,
    )


def _both_stages(short: str, where: str, shards: ShardsOf, paper: float | None) -> Row:
    return Row(
        name=f"both-stages-{short}",
        title=f"{where}: BCE3S, both stages",
        shards=shards,
        settings=("loss.name=bce3s",),
        stages=2,
        headline=STAGE_TWO + LAST,
        runs=f"bce3s-{short}",
        published=None if paper is None else Published(label=BCE3S_BOTH_STAGES, all=paper),
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
