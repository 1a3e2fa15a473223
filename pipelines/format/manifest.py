"""What a manifest may say. Nothing a reader does with one that passes here can fail on a missing key, another type or an odd file name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from pipelines.format.index import MANIFEST_FILE
from pipelines.types import SPLITS

_MAX_FAULTS = 200
_MAX_NAMED = 20  # missing keys in one sentence
_MAX_COUNT = 1 << 53
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_Check = tuple[Callable[[Any], bool], str]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT  # True is an int too


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


# A schema is a check of one value, [schema] of a list's items, or {key: schema} of an object, where "key?" may be absent.
_TEXT: _Check = (lambda value: isinstance(value, str), "text")
_FLAG: _Check = (lambda value: isinstance(value, bool), "true or false")
_COUNT: _Check = (_is_count, "a whole number from 0 on")
_NAME: _Check = (_matches(_PLAIN_NAME), "a plain name")
_DIGEST: _Check = (_matches(_SHA256), "a SHA-256 of 64 hex digits")
_FILE: dict[str, Any] = {"file": _NAME, "sha256": _DIGEST}
_STREAM: dict[str, Any] = {
    "num_samples": _COUNT,
    "class_counts": [_COUNT],
    "shards": [{**_FILE, "num_samples": _COUNT, "shard_bytes": _COUNT}],
    "index": _FILE,
}
_SPLIT = {**_STREAM, "beton?": {**_FILE, "num_samples": _COUNT, "beton_bytes": _COUNT}}
_RESAMPLED = {"name": _NAME, "sampling": _TEXT, "epoch_size": _COUNT, "class_counts": [_COUNT], "materialised": _FLAG}
_MANIFEST = {"dataset": _TEXT, "class_names": [_TEXT], "splits": {name: _SPLIT for name in SPLITS}, "resampled?": [_RESAMPLED]}


def manifest_faults(manifest: dict[str, Any]) -> list[str]:
    """What readers cannot work with: keys that are missing or of another kind.

    Args:
        manifest: any JSON object.

    Returns:
        Predicates of "manifest.json …", such as "lacks splits.val.index.file"; none for a good one.
    """
    faults = list(islice(_faults(manifest, _MANIFEST, ""), _MAX_FAULTS))
    if not faults:  # else `resampled` may not be a list
        for number, stream in enumerate(manifest.get("resampled", [])):
            schema = _STREAM if stream["materialised"] else {"order": _FILE, "dali?": _FILE}
            faults += _faults(stream, schema, f"resampled[{number}]")
    missing = [where for where, wanted in faults if not wanted]
    more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
    lacks = [f"lacks {', '.join(missing[:_MAX_NAMED])}{more}"] if missing else []
    return lacks + [f"has a {where} that is not {wanted}" for where, wanted in faults if wanted]


def _faults(value: Any, schema: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yields (key, what its value is not) for each fault, (key, "") for a key that is missing."""
    if isinstance(schema, tuple):
        check, wanted = schema
        if not check(value):
            yield where, wanted
    elif isinstance(schema, list):
        if not isinstance(value, list):
            yield where, "a list"
            return
        for number, item in enumerate(value):
            yield from _faults(item, schema[0], f"{where}[{number}]")
    elif not isinstance(value, dict):
        yield where, "an object"
    else:
        for key, inner in schema.items():
            name = key.removesuffix("?")
            path = f"{where}.{name}".lstrip(".")
            if name in value:
                yield from _faults(value[name], inner, path)
            elif not key.endswith("?"):
                # Of a missing object its keys are named: they are what has to be written.
                yield from _faults({}, inner, path) if isinstance(inner, dict) else [(path, "")]


def count_faults(manifest: dict[str, Any]) -> list[str]:
    """Where the numbers and names of a manifest without `manifest_faults` contradict one another; predicates as there."""
    num_classes = len(manifest["class_names"])
    faults = [] if num_classes else ["has no class_names"]
    for name, entry in streams(manifest).items():
        num_samples, num_counted = entry["num_samples"], sum(entry["class_counts"])
        num_stored = sum(shard["num_samples"] for shard in entry["shards"])
        if len(entry["class_counts"]) != num_classes:
            faults.append(f"has {len(entry['class_counts'])} class_counts of '{name}' for {num_classes} class_names")
        if not num_samples == num_counted == num_stored:
            faults.append(
                f"has {num_samples} num_samples of '{name}', but {num_counted} in its class_counts and {num_stored} in its shards"
            )
        if name in SPLITS and "beton" in entry and entry["beton"]["num_samples"] != num_samples:
            faults.append(f"has a beton of {entry['beton']['num_samples']} samples of '{name}', which has {num_samples}")
    for stream in manifest.get("resampled", []):
        if len(stream["class_counts"]) != num_classes or sum(stream["class_counts"]) != stream["epoch_size"]:
            faults.append(f"has class_counts of the resampled stream '{stream['name']}' that do not sum up to its epoch_size")
    named = [f"the file {file['file']}" for file in named_files(manifest)]
    named += [f"the resampled stream '{stream['name']}'" for stream in manifest.get("resampled", [])]
    return faults + [f"names {name} twice" for name, count in Counter(named).items() if count > 1]


def streams(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Everything that has tars and an index: the splits, and materialised resampled streams as 'train-NAME'; name -> entry."""
    materialised = {f"train-{stream['name']}": stream for stream in manifest.get("resampled", []) if stream["materialised"]}
    return {name: manifest["splits"][name] for name in SPLITS} | materialised


def named_files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entry (`file`, `sha256`, …) of every file that the manifest names, and its own, without a checksum."""
    # Only what the schema covers: other keys may hold anything.
    stored = streams(manifest).values()
    virtual = [stream for stream in manifest.get("resampled", []) if not stream["materialised"]]
    shards = [shard for entry in stored for shard in entry["shards"]]
    betons = [manifest["splits"][name]["beton"] for name in SPLITS if "beton" in manifest["splits"][name]]
    orders = [stream[key] for stream in virtual for key in ("order", "dali") if key in stream]
    return [{"file": MANIFEST_FILE}, *shards, *(entry["index"] for entry in stored), *betons, *orders]
