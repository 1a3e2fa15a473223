"""What a table is made of: rows, the shards they train on, published figures, claims, and the budget they are trained with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bce3s.config import TrainConfig, override
from bce3s.recipes import build_recipe
from bce3s.seeds import GROUPS
from pipelines.config import require

LAST = "last_epoch_no_tta"
AVERAGE = "last_epoch_average_no_tta"
STAGE_TWO = "stage2:"  # before the name of a measure of stage two
_NOT_SETTABLE = {
    "seed": "name the seeds of its runs with --seeds",
    "device": "name the device with --device",
    "dataset": "its rows name theirs, take another table",
}


def names_of(settings: Iterable[str]) -> list[str]:
    """'a.b' of every "a.b=value"."""
    return [setting.partition("=")[0].strip() for setting in settings]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures of somebody else, top-1 in percent; None where they are not published.

    Args:
        label: whose, and how they were measured where that is known: test-time augmentation, which epoch, which network.
    """

    label: str
    all: float
    many: float | None = None
    medium: float | None = None
    few: float | None = None

    def groups(self) -> dict[str, float | None]:
        """By shot group."""
        return {group: getattr(self, group) for group in GROUPS}


@dataclass(frozen=True, kw_only=True)
class ShardsOf:
    """Which shards a row trains on: CIFAR with `imbalance_factor`, of the first `classes` classes or all of them."""

    dataset: str
    imbalance_factor: int = 100
    classes: int | None = None

    @property
    def name(self) -> str:
        """Of their folder."""
        return f"{self.dataset}-if{self.imbalance_factor}" + ("" if self.classes is None else f"-{self.classes}classes")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table.

    Args:
        name: what --rows takes, and the folder of its runs.
        title: in the field's words.
        shards: what it trains on; None for a row that is only published.
        settings: "path=value", in place of the recipe's.
        scales: names of those of `settings` that are computed from the budget's value, and so go with --set instead of against it.
        stages: 2 trains the classifier anew after stage one.
        headline: the measure that the table compares.
        runs: name of the row whose runs these are too: the same training, measured otherwise; empty is its own.
        published: beside ours.
    """

    name: str
    title: str
    shards: ShardsOf | None = None
    settings: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()
    stages: int = 1
    headline: str = LAST
    runs: str = ""
    published: Published | None = None

    @property
    def run_name(self) -> str:
        """Of the folder of its runs, without the seed."""
        return self.runs or self.name


@dataclass(frozen=True)
class Claim:
    """That row `better` is above row `worse` in shot group `group`."""

    better: str
    worse: str
    group: str = "all"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a table may cost.

    Args:
        name: what --budget takes.
        recipes: data set -> recipe that all rows start from.
        settings: data set -> "path=value" in place of the recipe's, before those of a row.
        classes: data set -> how many of its classes take part; one that is not named keeps all.
        notes: sentences on what this budget makes of a table.
    """

    name: str
    recipes: Mapping[str, str]
    settings: Mapping[str, tuple[str, ...]]
    classes: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def shards(self, dataset: str, imbalance_factor: int = 100) -> ShardsOf:
        """Those of a data set."""
        return ShardsOf(dataset=dataset, imbalance_factor=imbalance_factor, classes=self.classes.get(dataset))

    def base(self, dataset: str) -> TrainConfig:
        """What the rows of a data set have in common, without what their methods decide."""
        return override(build_recipe(self.recipes[dataset], dataset), list(self.settings[dataset]))

    def with_settings(self, settings: Sequence[str]) -> Budget:
        """The same with further "path=value" for all rows, after its own and before those of a row.

        Raises:
            ConfigError: one that the command has an option of its own for, or the table decides.
        """
        for name in names_of(settings):
            require(name not in _NOT_SETTABLE, f"--set {name}=… does not go with a table: {_NOT_SETTABLE.get(name)}")
        return replace(self, settings={dataset: (*before, *settings) for dataset, before in self.settings.items()})


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Args:
        name: what the command takes.
        title: what it shows.
        budget: that it was built for.
        rows: in the order of the page.
        claims: what the source says of them.
        notes: sentences for the page.
    """

    name: str
    title: str
    budget: Budget
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> Row:
        """By name."""
        return next(row for row in self.rows if row.name == name)

    def published_difference(self, claim: Claim) -> float | None:
        """In points; None where either figure is not published, or they were measured otherwise: a difference of those says nothing."""
        better, worse = self.row(claim.better).published, self.row(claim.worse).published
        if better is None or worse is None or better.label != worse.label:
            return None
        first, second = better.groups()[claim.group], worse.groups()[claim.group]
        return None if first is None or second is None else first - second


_REFERENCE = {"cifar10-lt": "cifar10lt_resnet34_320ep", "cifar100-lt": "cifar100lt_resnet34_320ep"}
FULL = Budget(
    name="full",
    recipes=_REFERENCE,
    settings=dict.fromkeys(_REFERENCE, ()),
    classes={},
    notes=("Every row has the reference's recipe and budget (method.md).",),
)

# Sized for a minute a run on one core. ResNet-8 trains three times as many source images/s at 16 px as at 32 px, and in equal time learns
# more: 32.0 against 20.7 % (BCE3S, 20 classes, 40 against 12 epochs, n = 1).
_TINY = (
    *("model.arch=resnet8-cifar", "data.image_size=16", "data.augment.crop=resized", "data.augment.area_range=0.5,1.0"),
    "data.num_threads=1",
)
SMALL = Budget(
    name="small",
    recipes=dict.fromkeys(_REFERENCE, "cifar10lt_resnet20_40ep"),
    settings={
        "cifar10-lt": (*_TINY, "epochs=8", "eval_every=8"),
        "cifar100-lt": (*_TINY, "epochs=40", "eval_every=40"),
    },
    classes={"cifar100-lt": 20},
    notes=(
        "Small budget: ResNet-8 at 16 px, few epochs, crop and flip only, and of CIFAR-100 the first 20 classes. It shows that the table "
        "can be made, and which differences are there at this size; its accuracies are not to be compared with the published ones.",
    ),
)
BUDGETS = {"full": FULL, "small": SMALL}
