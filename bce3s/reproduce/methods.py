"""All methods of the project on one recipe, so that what differs between the rows is the method."""

from __future__ import annotations

from bce3s.reproduce.grid import Budget, Claim, Published, Row, Table
from bce3s.reproduce.sources import ABLATION, GLMC, PROCO

# Not ours to reproduce with this recipe: the labels say what else is different.
_OTHERS = {"glmc": Published(label=GLMC, all=57.97), **{name: ABLATION[name] for name in ("bce3s", "bce", "ce")}}
_ELSEWHERE = (
    ("proco", "ProCo", PROCO, 52.8),
    ("weight-balancing", "weight balancing", "WB, its repository; other recipe (ResNet-34, crop and flip, two stages), flip TTA", 53.1),
    ("sade", "SADE", "SADE, its repository; other backbone and recipe (ResNet-32, three experts)", 49.8),
)


def methods_cifar100(budget: Budget) -> Table:
    """CIFAR100-LT, imbalance factor 100: every method of `LOSSES` on the recipe of BCE3S (published: method.md, field.md 2)."""
    from bce3s.losses import LOSSES  # torch comes with it

    shards = budget.shards("cifar100-lt")
    names = [name for name in LOSSES if name != "tsl"]  # a grid of its own: ablation-cifar100
    rows = [Row(name=name, title=name, shards=shards, settings=(f"loss.name={name}",), published=_OTHERS.get(name)) for name in names]
    rows += [Row(name=name, title=title, published=Published(label=label, all=overall)) for name, title, label, overall in _ELSEWHERE]
    claims = tuple(Claim("bce3s", name) for name in names if name != "bce3s")
    notes = ("One recipe for all, BCE3S's; methods that were tuned on another one may lose by that.",)
    title = "CIFAR100-LT, imbalance factor 100: the field's methods on one recipe, stage one"
    return Table(name="methods-cifar100", title=title, budget=budget, rows=tuple(rows), claims=claims, notes=notes)
