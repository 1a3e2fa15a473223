"""Config trees as JSON, and single settings of them by path."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any, TypeVar

from pipelines.config import did_you_mean
from pipelines.types import ConfigError

_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}

ConfigT = TypeVar("ConfigT")


def to_json(config: Any) -> str:
    """The config tree as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_dict(kind: type[ConfigT], values: dict[str, Any], path: str = "") -> ConfigT:
    """Rebuilds a config tree from `dataclasses.asdict` or JSON.

    Raises:
        ConfigError: an unknown key or a value of the wrong type; names its path.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"unknown setting '{path}{unknown[0]}'; known here: {', '.join(path + name for name in hints)}")
    built = {name: _convert(hints[name], value, f"{path}{name}") for name, value in values.items()}
    return kind(**built)


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ConfigError(
                f"'{path}' is a group of settings; set one of {', '.join(f'{path}.{f.name}' for f in dataclasses.fields(kind))}"
            )
        return from_dict(kind, value, f"{path}.")
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        item_kinds = typing.get_args(kind)
        if len(items) != len(item_kinds):
            raise ConfigError(f"{path} takes {len(item_kinds)} values, not {len(items)}")
        return tuple(_convert(item_kind, item, path) for item_kind, item in zip(item_kinds, items, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path} takes {_KINDS[kind]}, not {value!r}")
    return value


def override(config: ConfigT, assignments: list[str]) -> ConfigT:
    """Applies `a.b=value` assignments; values are JSON, anything else is taken as text, commas make tuples.

    Raises:
        ConfigError: no '=', an unknown path (the known ones are listed) or a value of the wrong type.
    """
    values = dataclasses.asdict(config)  # type: ignore[call-overload]
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set takes path=value, such as --set optimizer.learning_rate=0.1, not '{assignment}'")
        *groups, name = path.strip().split(".")
        target = values
        for group in groups:
            target = target.get(group) if isinstance(target, dict) else None
        if not isinstance(target, dict) or name not in target:
            raise ConfigError(_unknown_setting(path.strip(), values))
        if isinstance(target[name], dict):
            raise ConfigError(f"'{path}' is a group of settings; set one of {', '.join(by_path(target[name], path + '.'))}")
        target[name] = _parse(text, target[name])
    return from_dict(type(config), values)


def _unknown_setting(path: str, values: dict[str, Any]) -> str:
    """Lists the neighbours of what was meant, or else the groups, and not the hundred settings there are."""
    known = by_path(values)
    group, _, leaf = path.rpartition(".")
    near = [name for name in known if group and name.startswith(f"{group}.")]
    shown = near or [f"{name}.…" if isinstance(value, dict) else name for name, value in values.items()]
    # Of a name without its group, or of lr and wd, the group is what is looked for.
    meant = [name for name in near or known if leaf in (_leaf(name), "".join(word[0] for word in _leaf(name).split("_")))]
    alike = did_you_mean(leaf, {_leaf(name): name for name in near}) if near else did_you_mean(path, list(known))
    hint = f"; did you mean '{meant[0]}'?" if meant else alike
    return f"unknown setting '{path}'; known: {', '.join(shown)}; --print-config shows all{hint}"


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _parse(text: str, current: Any) -> Any:
    if isinstance(current, (list, tuple)):
        return [_parse(part, current[0]) for part in text.strip("[]() ").split(",")]
    if isinstance(current, str):
        return text
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def by_path(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a config tree, such as `dataclasses.asdict` or its JSON gives, by their full names: {"data.order.sampling": …}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= by_path(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
