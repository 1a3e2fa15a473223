"""The tables by name; a new one is a function `Budget -> Table` and one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from bce3s.reproduce.ablation import ablation_cifar100
from bce3s.reproduce.beyond import beyond_cifar100
from bce3s.reproduce.cifar_main import cifar_main
from bce3s.reproduce.grid import BUDGETS, Budget, Row, Table, names_of
from bce3s.reproduce.methods import methods_cifar100
from pipelines.config import require_choice
from pipelines.types import ConfigError

TABLES: dict[str, Callable[[Budget], Table]] = {
    "ablation-cifar100": ablation_cifar100,
    "cifar-main": cifar_main,
    "methods-cifar100": methods_cifar100,
    "beyond-cifar100": beyond_cifar100,
}


def build_table(name: str, budget: str, settings: Sequence[str] = ()) -> Table:
    """The table `name`, sized for the budget of that name, with further "path=value" for all rows and a note that says so.

    Raises:
        ConfigError: an unknown table or budget, with the known ones; a setting that is not for a table, or that a row sets itself.
    """
    require_choice("table", name, tuple(TABLES))
    require_choice("budget", budget, tuple(BUDGETS))
    table = TABLES[name](BUDGETS[budget].with_settings(settings))
    if not settings:
        return table
    for row in table.rows:
        for setting in sorted((set(names_of(row.settings)) - set(row.scales)) & set(names_of(settings))):
            raise ConfigError(f"--set {setting}=… is for all rows, and the row {row.name} of {name} sets {setting} itself; leave it out")
    return replace(table, notes=(*table.notes, f"Other than the budget's, for all rows: {', '.join(settings)}."))


def select_rows(table: Table, names: str | None) -> list[Row]:
    """The rows to train: those named, separated by commas, or all; a row that is only published has nothing to train.

    Raises:
        ConfigError: an unknown row; lists those that can be trained.
    """
    trained = {row.name: row for row in table.rows if row.shards is not None}
    if names is None:
        return list(trained.values())
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if not asked:
        raise ConfigError(f"--rows is empty; the rows of {table.name}: {', '.join(trained)}")
    for name in asked:
        require_choice(f"row of {table.name}", name, tuple(trained))
    return [trained[name] for name in dict.fromkeys(asked)]
