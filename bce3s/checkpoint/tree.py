"""A state as plain values that JSON can hold, with its tensors taken out and named; and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.types import JsonValue

# The kinds of tensor that every version of the format's library reads, by their names there.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Parts:
    """A state taken apart.

    Args:
        tree: what JSON can hold: a dict is {"dict": [[key, value], …]}, a tuple {"tuple": […]}, a tensor {"tensor": its name}. So no
            value can be mistaken for a marker, and keys keep their type and order.
        tensors: name -> tensor, as found: any device, any strides, shared or not. Names are dotted places, such as "model.fc.weight".
        odd_floats: the places of Python floats that are NaN or infinite, which JSON cannot hold.
    """

    tree: JsonValue
    tensors: dict[str, torch.Tensor]
    odd_floats: tuple[str, ...]


def take_apart(state: dict[str, Any]) -> Parts:
    """Takes the tensors out of a tree of dicts (keys str or int), lists, tuples, None, bool, int, float, str and tensors.

    Raises:
        TypeError: anything else is in it; names the place.
    """
    tensors: dict[str, torch.Tensor] = {}
    odd_floats: list[str] = []

    def encode(value: Any, place: str) -> JsonValue:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                odd_floats.append(place)
            return value
        if isinstance(value, dict):
            return {"dict": [[_key(key, place), encode(item, _below(place, key))] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [encode(item, _below(place, position)) for position, item in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.dtype in DTYPES.values():
            name = _free_name(place, tensors)
            tensors[name] = value.detach()
            return {"tensor": name}
        kind = f"a {value.layout} tensor of {value.dtype}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"a checkpoint cannot hold {place or 'the state'}, which is {kind}")

    return Parts(encode(state, ""), tensors, tuple(odd_floats))


def put_together(tree: JsonValue, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The inverse of `take_apart`.

    Raises:
        ValueError: `tree` is none that `take_apart` makes, or does not name each of `tensors` exactly once.
    """
    left = dict(tensors)
    state = _decode(tree, left)
    if left or not isinstance(state, dict):
        raise ValueError(f"tensor {min(left)} belongs nowhere" if left else "its values are no dict")
    return state


def _decode(node: JsonValue, left: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, left) for item in node]
    if not isinstance(node, dict):
        return node
    match list(node.items()):
        case [("tensor", str(name))] if name in left:
            return left.pop(name)
        case [("tuple", list(items))]:
            return tuple(_decode(item, left) for item in items)
        case [("dict", list(pairs))]:
            return dict(_pairs(pairs, left))
    raise ValueError(f"it holds an unknown value {str(node)[:80]}")


def _pairs(pairs: list[JsonValue], left: dict[str, torch.Tensor]) -> Iterator[tuple[str | int, Any]]:
    seen: set[str | int] = set()
    for pair in pairs:
        match pair:
            case [str(key) | int(key), item] if key not in seen and not isinstance(key, bool):
                seen.add(key)
                yield key, _decode(item, left)
            case _:
                raise ValueError(f"it holds an unknown entry {str(pair)[:80]}")


def _key(key: Any, place: str) -> str | int:
    if not isinstance(key, (str, int)) or isinstance(key, bool):
        raise TypeError(f"a checkpoint cannot hold {place or 'the state'}, which has the key {key!r}")
    return key


def _below(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _free_name(place: str, taken: dict[str, torch.Tensor]) -> str:
    """`place`, or another name where it is taken ("a.b" beside b in a), is the format's own, or is no text in UTF-8."""
    name = stem = place.encode("utf-8", "replace").decode("utf-8")
    while name in taken or name == "__metadata__":
        name = f"{stem}~{len(taken)}" if name == stem else f"{name}~"
    return name
