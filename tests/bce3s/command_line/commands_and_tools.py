"""Every command line there is, as typer knows it."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

from typer.main import get_command

from bce3s.cli import COMMANDS
from bce3s.command_line.lazy import Entry, load_command

ROOT = Path(__file__).resolve().parents[3]
TOOLS = tuple(sorted(path.stem for path in (ROOT / "tools").glob("*_shards.py")))


@cache
def command_lines() -> dict[str, Any]:
    """Name -> command of `bce3s` and of the scripts in tools/, with the commands of the latter."""
    found = {name: load_command(name, Entry(*entry)) for name, entry in COMMANDS.items()}
    for tool in TOOLS:
        name = f"{tool}_options"
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{tool}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        command = get_command(module.app)
        found[f"{tool}.py"] = command
        found |= {f"{tool}.py {inner}": each for inner, each in getattr(command, "commands", {}).items()}
    return found


def options_by_name() -> dict[str, list[tuple[str, Any]]]:
    """ "--out" -> the commands that have it, with what each knows of it."""
    found: dict[str, list[tuple[str, Any]]] = {}
    for name, command in command_lines().items():
        for option in command.params:
            if option.param_type_name == "option":
                found.setdefault(option.opts[0], []).append((name, option))
    return found
