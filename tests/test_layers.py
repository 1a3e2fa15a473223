"""The house keeps its plan: imports go downwards only, files and functions stay within their budgets.

Every module belongs to a room, rooms lie on floors. A room may use the rooms below it and itself; rooms of one floor may use each
other only where the floor says so. What counts as an import: `import`, `from … import` (in functions and under TYPE_CHECKING too),
`import_module("…")`, and a "module:Name" string, the form in which optional backends are named.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Floor(NamedTuple):
    rooms: tuple[str, ...]
    neighbours_meet: bool  # may rooms of this floor import each other?


def _under(package: str, names: str) -> tuple[str, ...]:
    return tuple(f"{package}.{name}" for name in names.split())


# From the ground up. A new module of a package goes into the lowest floor whose rooms and those below it cover what it imports.
FLOORS = (
    Floor(("pipelines",), False),  # the __init__ alone: the guard
    Floor(_under("pipelines", "types config randomness durable store"), True),
    Floor(_under("pipelines", "order format augment datasets"), False),
    Floor(_under("pipelines", "loaders conversion"), False),
    Floor(("bce3s",), False),  # the __init__ alone: the version
    Floor(_under("bce3s", "config"), False),
    Floor(_under("bce3s", "distributed heads"), False),
    Floor(_under("bce3s", "models losses checkpoint runlog metrics device"), False),
    Floor(
        _under("bce3s", "step graph optimizers weight_average train interrupt seeds launch")
        + _under(
            "bce3s",
            "retrain evaluate reproduce throughput report recipes progress export predict doctor watch trackers command_line fast_train",
        ),
        True,
    ),
    Floor(_under("bce3s", "cli"), False),
    Floor(("tools", "benchmarks", "tests"), False),
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor.rooms}
PACKAGES = ("pipelines", "bce3s")
ATTIC = FLOORS[-1].rooms
LAZY_ENTRY = re.compile(r"((?:pipelines|bce3s)(?:\.\w+)*):\w+")

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60


# ---- which room, which imports


def module_name(path: Path) -> str:
    """`pipelines/format/__init__.py` -> `pipelines.format`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """`pipelines.loaders.dali` -> `pipelines.loaders`; of the attic, the folder."""
    parts = module.split(".")
    return parts[0] if parts[0] in ATTIC else ".".join(parts[:2])


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; a name taken from a package's root is reported as `root.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute_source(node, module, is_package)
            if source in (*PACKAGES, *ATTIC):
                yield from ((node.lineno, source if is_root_attribute(alias.name) else f"{source}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, source
        elif isinstance(node, ast.Call) and called_name(node.func) in ("import_module", "__import__") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value.partition(":")[0]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (entry := LAZY_ENTRY.fullmatch(node.value)):
            yield node.lineno, entry[1]


def absolute_source(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, node.module] if node.module else kept)


def is_root_attribute(name: str) -> bool:
    return name == "*" or name.startswith("__")


def called_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""


# ---- the two checks, each a list of sentences


def layer_faults(path: Path, source: str, tool_names: frozenset[str] = frozenset()) -> list[str]:
    """What `source`, lying at `path` relative to the root, imports but must not."""
    module = module_name(path)
    room = room_of(module)
    if room not in FLOOR_OF:
        return [f"{path}: the room {room} is not in the plan: add it to its floor in FLOORS of tests/test_layers.py"]
    faults = []
    for line, target in imported_modules(ast.parse(source), module, path.name == "__init__.py"):
        fault = import_fault(room, target, tool_names)
        if fault:
            faults.append(f"{path}:{line}: {fault}")
    return faults


def import_fault(room: str, target: str, tool_names: frozenset[str]) -> str | None:
    top = target.partition(".")[0]
    if top in ATTIC or top in tool_names:
        return f"{room} imports {target}: nothing imports {', '.join(ATTIC)}; move what is shared into a package"
    if top not in PACKAGES:
        return None
    other = room_of(target)
    if other == room:
        return None
    if other not in FLOOR_OF:
        return f"{room} imports {target}, and {other} is not in the plan: add it to its floor in FLOORS of tests/test_layers.py"
    if FLOOR_OF[other] > FLOOR_OF[room]:
        return f"{room} imports {target}, which lies above it: imports go downwards only"
    if FLOOR_OF[other] == FLOOR_OF[room] and not FLOORS[FLOOR_OF[room]].neighbours_meet:
        return f"{room} imports {target}, its neighbour: these meet one floor below or one above, not directly"
    return None


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that are neither blank, comment nor docstring."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def budget_faults(path: Path, source: str) -> list[str]:
    lines = code_lines(source)
    faults = []
    if len(lines) > MAX_FILE_LINES:
        faults.append(f"{path}: {len(lines)} code lines, the budget is {MAX_FILE_LINES}: split it by topic")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = len(lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            if length > MAX_FUNCTION_LINES:
                faults.append(f"{path}:{node.lineno}: {node.name} has {length} code lines, the budget is {MAX_FUNCTION_LINES}")
    return faults


# ---- the house as it stands


def python_files(*folders: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


# Benchmarks make their sets and report their figures alike: the modules that scripts beside them import.
SHARED_BY_SCRIPTS = {"photographs", "turns", "step_bench", "step_around", "step_ranks"}
TOOL_NAMES = frozenset(path.stem for path in python_files("tools", "benchmarks")) - SHARED_BY_SCRIPTS


@pytest.mark.parametrize("path", python_files("pipelines", "bce3s", "tools", "benchmarks"), ids=str)
def test_imports_go_downwards(path: Path) -> None:
    faults = layer_faults(path, (ROOT / path).read_text(encoding="utf-8"), TOOL_NAMES)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", python_files("pipelines", "bce3s", "tools", "benchmarks", "tests"), ids=str)
def test_budgets(path: Path) -> None:
    faults = budget_faults(path, (ROOT / path).read_text(encoding="utf-8"))
    assert not faults, "\n".join(faults)


# ---- the checks themselves: made-up sources that must fail, and look-alikes that must pass


@pytest.mark.parametrize(
    ("path", "source", "sentence"),
    [
        ("pipelines/order.py", "import bce3s.config", "downwards only"),
        ("pipelines/types.py", "from pipelines.loaders import build_loader", "downwards only"),
        ("pipelines/types.py", "from . import order", "downwards only"),
        ("pipelines/__init__.py", "from pipelines.types import Batch", "downwards only"),
        ("pipelines/__init__.py", "from .types import Batch", "downwards only"),
        ("pipelines/format/reader.py", "from ..datasets import DATASETS", "neighbour"),
        ("pipelines/augment/mix.py", "from pipelines import order", "neighbour"),
        ("pipelines/augment/mix.py", "from pipelines import *\nimport pipelines.order as o", "neighbour"),
        ("bce3s/config/loss.py", "from bce3s.losses import LOSSES", "downwards only"),
        ("bce3s/losses/bce3s.py", "def f():\n    from bce3s.models import head", "neighbour"),
        ("bce3s/losses/bce3s.py", "if TYPE_CHECKING:\n    import bce3s.train", "downwards only"),
        ("bce3s/metrics.py", 'ENTRY = "bce3s.evaluate:evaluate"', "downwards only"),
        ("pipelines/loaders/__init__.py", 'LOADERS = {"x": "bce3s.step:Loader"}', "downwards only"),
        ("bce3s/runlog.py", 'importlib.import_module("bce3s.report")', "downwards only"),
        ("bce3s/train.py", "import bce3s.cli", "downwards only"),
        ("bce3s/cli.py", "from tools import make_shards", "nothing imports"),
        ("bce3s/cli.py", "import make_shards", "nothing imports"),
        ("tools/verify_shards.py", "from make_shards import main", "nothing imports"),
        ("pipelines/utils.py", "", "add it to its floor"),
        ("bce3s/cli.py", "from bce3s import helpers", "add it to its floor"),
    ],
)
def test_layer_check_sees(path: str, source: str, sentence: str) -> None:
    faults = layer_faults(Path(path), source, frozenset({"make_shards"}))
    assert len(faults) == 1
    assert sentence in faults[0]
    assert faults[0].startswith(path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pipelines/config.py", "from pipelines.types import ConfigError"),
        ("pipelines/format/reader.py", "from .index import read\nfrom pipelines.format import tar"),
        ("pipelines/loaders/dali.py", "from pipelines import augment, datasets, format, order"),
        ("pipelines/loaders/__init__.py", 'LOADERS = {"dali": "pipelines.loaders.dali:DaliLoader"}'),
        ("pipelines/order.py", "import typesafe, bce3s_extras, numpy"),
        ("bce3s/__init__.py", "import pipelines\nfrom pipelines import __project__"),
        ("bce3s/train.py", "from bce3s import __version__\nfrom bce3s.step import train_step\nimport pipelines.loaders"),
        ("bce3s/runlog.py", '"bce3s.train: a sentence, no entry"'),
        ("tools/make_shards.py", "import bce3s.cli\nfrom pipelines.conversion import write_shards"),
    ],
)
def test_layer_check_passes(path: str, source: str) -> None:
    assert layer_faults(Path(path), source, frozenset({"make_shards"})) == []


def test_code_lines_counts_code_only() -> None:
    source = '"""Doc\nstring."""\n\n# why\nx = """a\nb"""  # code\n\n\ndef f():\n    """Doc."""\n    return (\n        1\n    )\n'
    assert code_lines(source) == {5, 6, 9, 11, 12, 13}


def test_budget_check_sees_long_files_and_functions() -> None:
    line = "x = 1\n"
    assert budget_faults(Path("a.py"), line * MAX_FILE_LINES) == []
    assert "split it" in budget_faults(Path("a.py"), line * (MAX_FILE_LINES + 1))[0]
    body = f"    {line}"
    assert budget_faults(Path("a.py"), "def f():\n" + body * (MAX_FUNCTION_LINES - 1)) == []
    assert "f has 61 code lines" in budget_faults(Path("a.py"), "def f():\n" + body * MAX_FUNCTION_LINES)[0]
