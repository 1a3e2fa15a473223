"""Names that options take, for help texts and for the shell to complete.

Some of their registries lie in packages that import torch, and a press of the tab key cannot wait two seconds. So the keys are read from
the source of the package, which is parsed and not run; a new method stays one file and one line.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

Completion = Callable[[str], list[str]]


@cache
def names_in(package: str, registry: str) -> tuple[str, ...]:
    """The keys of the dictionary `registry` as written in `package`, in their order.

    Args:
        package: dotted name of a package or module, which is not imported; those above it are.
        registry: its name at the top level there, assigned a dictionary literal.
    """
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == registry for target in targets):
            written = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
            assert isinstance(written, ast.Dict)
            return tuple(key.value for key in written.keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
    raise AssertionError(f"{package} assigns no {registry}")


def dataset_names() -> tuple[str, ...]:
    """Names of `pipelines.datasets.DATASETS`."""
    return names_in("pipelines.datasets", "DATASETS")


def loader_names() -> tuple[str, ...]:
    """What --loader takes."""
    return ("auto", *names_in("pipelines.loaders", "LOADERS"))


def method_names() -> tuple[str, ...]:
    """Names of `bce3s.losses.LOSSES`."""
    return names_in("bce3s.losses", "LOSSES")


def arch_names() -> tuple[str, ...]:
    """Names of `bce3s.models.ARCHS`."""
    return names_in("bce3s.models", "ARCHS")


def table_names() -> tuple[str, ...]:
    """Names of `bce3s.reproduce.tables.TABLES`."""
    return names_in("bce3s.reproduce.tables", "TABLES")


def recipe_names() -> tuple[str, ...]:
    """Names of `bce3s.recipes.RECIPES`."""
    from bce3s.recipes import RECIPES

    return tuple(RECIPES)


def setting_names() -> tuple[str, ...]:
    """`path=` of everything that --set reaches."""
    from dataclasses import asdict

    from bce3s.config import by_path
    from bce3s.recipes import RECIPES

    return tuple(f"{path}=" for path in by_path(asdict(next(iter(RECIPES.values()))())))


def completing(names: Callable[[], tuple[str, ...]] | tuple[str, ...]) -> Completion:
    """What typer calls on a press of the tab key: those of `names` that begin with what is typed; called or read only then."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in (names() if callable(names) else names) if name.startswith(incomplete)]

    return complete
