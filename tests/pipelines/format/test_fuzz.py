"""Whatever bytes a shard folder holds, readers work or say in one sentence why not; they never hang or read files of elsewhere."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.format import INDEX_DTYPE
from pipelines.format.index import npy_bytes
from pipelines.format.tar import member_header
from pipelines.format.verify import verify_shards
from pipelines.types import SPLITS
from tests.pipelines.format.folders import holds_up, read_json, write_folder, write_json
from tests.pipelines.format.images import damage, damaged


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("good") / "shards")


@pytest.fixture(scope="module")
def root(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which examples replace one file, again and again."""
    return Path(shutil.copytree(good, tmp_path_factory.mktemp("fuzz") / "shards"))


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "shards"))


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


# ---- manifests

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 17, 19, 2**31, 2**32, 2**53, 2**53 + 1, 2**63, 2**64, -(2**63), 10**300),
    *(0.5, 18.0, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", ".", "..", "\0", "a\0b", "../manifest.json", "/etc/passwd", "a/b", "\\", "\ud800", "x" * 300, "é", "CON", "train", "18", " "),
    *("train-000000.tar", "train.index.npy", "test-000000.tar", "val.index.npy", "manifest.json", "train.class-balanced.dali"),
    *(
        "0" * 64,
        "f" * 63,
        [],
        {},
        [[]],
        [0],
        [18],
        [9, 6, 3],
        [-9, 12, 15],
        ["ant"],
        ["ant", "bee", "cat"],
        [2**62, 2**62, 2**62],
        {"file": 3},
    ),
)
scalars = st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=20)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)


def paths_in(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The key path of every value below `value`."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*where, key)
            yield from paths_in(inner, (*where, key))


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[float, str, Any]]:
    """Where (a share of all places), what, with what."""
    kinds = st.sampled_from(["delete", "set", "set", "set", "add", "repeat", "graft"])
    return draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), kinds, json_values), min_size=1, max_size=3))


def mutated(manifest: dict[str, Any], changes: list[tuple[float, str, Any]]) -> dict[str, Any]:
    manifest = copy.deepcopy(manifest)
    for share, kind, value in changes:
        places = list(paths_in(manifest))
        if not places:
            break
        *above, key = places[int(share * len(places))]
        parent: Any = manifest
        value = copy.deepcopy(value)  # a later change may go into it
        for step in above:
            parent = parent[step]
        if kind == "delete":
            del parent[key]
        elif kind == "set":
            parent[key] = value
        elif kind == "add":
            parent.insert(0, value) if isinstance(parent, list) else parent.update({"added": value})
        elif kind == "repeat":
            parent.append(copy.deepcopy(parent[key])) if isinstance(parent, list) else parent.update({f"{key} ": parent[key]})
        else:
            parent[key] = copy.deepcopy(manifest)
    return manifest


def check_manifest(root: Path, good: Path, changes: list[tuple[float, str, Any]]) -> None:
    with replaced(root / "manifest.json", json.dumps(mutated(read_json(good), changes)).encode()):
        holds_up(root)


def check_manifest_bytes(root: Path, good: Path, change: tuple[str, float, int]) -> None:
    with replaced(root / "manifest.json", damaged((good / "manifest.json").read_bytes(), *change)):
        holds_up(root)


HUGE_NUMBER = b'{"format": "bce3s-shards", "version": ' + b"9" * 5000 + b"}"
DEEP = b'{"format": "bce3s-shards", "version": ' + b"[" * 900 + b"]" * 900 + b"}"


class TestManifests:
    @given(value=json_values)
    def test_any_json(self, root: Path, value: Any) -> None:
        with replaced(root / "manifest.json", json.dumps(value).encode()):
            assert not holds_up(root)

    @given(value=json_values)
    def test_any_json_behind_the_right_name_and_version(self, root: Path, value: Any) -> None:
        headed = {"format": "bce3s-shards", "version": 1, "dataset": "x", "class_names": ["a"], "splits": value, "resampled": value}
        with replaced(root / "manifest.json", json.dumps(headed).encode()):
            assert not holds_up(root)

    @given(changes=mutations())
    def test_mutations_of_a_real_one(self, root: Path, good: Path, changes: list[tuple[float, str, Any]]) -> None:
        check_manifest(root, good, changes)

    @given(change=damage)
    def test_damaged_bytes(self, root: Path, good: Path, change: tuple[str, float, int]) -> None:
        check_manifest_bytes(root, good, change)

    @pytest.mark.slow
    @settings(max_examples=10_000, suppress_health_check=[HealthCheck.too_slow])
    @given(changes=mutations())
    def test_ten_thousand_mutations(self, root: Path, good: Path, changes: list[tuple[float, str, Any]]) -> None:
        check_manifest(root, good, changes)

    @pytest.mark.slow
    @settings(max_examples=5_000)
    @given(change=damage)
    def test_five_thousand_damages(self, root: Path, good: Path, change: tuple[str, float, int]) -> None:
        check_manifest_bytes(root, good, change)

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, DEEP, HUGE_NUMBER, b"NaN", b'"\xed\xa0\x80"', b'{"a":1'])
    def test_what_json_itself_stumbles_over(self, root: Path, content: bytes) -> None:
        with replaced(root / "manifest.json", content):
            assert not holds_up(root)

    def test_every_hostile_value_in_every_place_that_readers_use(self, root: Path, good: Path) -> None:
        manifest = read_json(good)
        places = [place for place in paths_in({key: manifest[key] for key in ("splits", "class_names", "dataset")}) if "val" not in place]
        for place in places:
            for value in HOSTILE[:: len(places) // 4]:
                changed = copy.deepcopy(manifest)
                parent = changed
                for step in place[:-1]:
                    parent = parent[step]
                parent[place[-1]] = value
                with replaced(root / "manifest.json", json.dumps(changed).encode()):
                    holds_up(root)

    def test_what_is_not_specified_is_not_read(self, copied: Path) -> None:
        manifest = read_json(copied)
        manifest["splits"]["dev"] = []
        for entry in (*(manifest["splits"][name] for name in SPLITS), *manifest["resampled"], manifest):
            for key in ("order", "dali", "shards", "index", "splits", "later"):
                entry.setdefault(key, [0, {"file": "/etc/passwd"}])
        write_json(copied, manifest)
        assert holds_up(copied)

    def test_of_a_key_that_stands_twice_the_last_counts(self, root: Path, good: Path) -> None:
        text = (good / "manifest.json").read_text()
        with replaced(root / "manifest.json", text.replace('"dataset"', '"dataset": [], "dataset"', 1).encode()):
            assert holds_up(root)


# ---- indexes

EXTREMES = (0, 1, 511, 512, 513, 20_479, 20_480, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 512, 2**64 - 1)
record_changes = st.lists(
    st.tuples(st.sampled_from(INDEX_DTYPE.names or ()), st.integers(0, 17), st.sampled_from(EXTREMES) | st.integers(0, 2**64 - 1)),
    min_size=1,
    max_size=4,
)


def check_records(root: Path, good: Path, changes: list[tuple[str, int, int]]) -> None:
    index = np.load(good / "train.index.npy")
    for field, row, value in changes:
        kind = INDEX_DTYPE[field]
        index[field][row] = np.frombuffer(value.to_bytes(8, "little")[: kind.itemsize], kind)[0]
    with replaced(root / "train.index.npy", npy_bytes(index)):
        holds_up(root)


def check_index_bytes(root: Path, good: Path, change: tuple[str, float, int]) -> None:
    with replaced(root / "train.index.npy", damaged((good / "train.index.npy").read_bytes(), *change)):
        holds_up(root)


class TestIndexes:
    @given(changes=record_changes)
    def test_any_records(self, root: Path, good: Path, changes: list[tuple[str, int, int]]) -> None:
        check_records(root, good, changes)

    @given(change=damage)
    def test_damaged_bytes(self, root: Path, good: Path, change: tuple[str, float, int]) -> None:
        check_index_bytes(root, good, change)

    @given(content=st.binary(max_size=300))
    def test_any_bytes(self, root: Path, content: bytes) -> None:
        with replaced(root / "train.index.npy", content):
            assert not holds_up(root)

    @pytest.mark.slow
    @settings(max_examples=10_000)
    @given(changes=record_changes)
    def test_ten_thousand_records(self, root: Path, good: Path, changes: list[tuple[str, int, int]]) -> None:
        check_records(root, good, changes)

    @pytest.mark.slow
    @settings(max_examples=5_000)
    @given(change=damage)
    def test_five_thousand_damages(self, root: Path, good: Path, change: tuple[str, float, int]) -> None:
        check_index_bytes(root, good, change)


# ---- tars


def check_tar_bytes(root: Path, good: Path, change: tuple[str, float, int]) -> None:
    content = damaged((good / "train-000001.tar").read_bytes(), *change)
    with replaced(root / "train-000001.tar", content):
        same = content == (good / "train-000001.tar").read_bytes()
        assert same == (verify_shards(root, num_threads=1) == [])
        holds_up(root)


class TestTars:
    @given(change=damage)
    def test_damaged_bytes_are_found_and_never_fatal(self, root: Path, good: Path, change: tuple[str, float, int]) -> None:
        check_tar_bytes(root, good, change)

    @pytest.mark.slow
    @settings(max_examples=5_000)
    @given(change=damage)
    def test_five_thousand_damages(self, root: Path, good: Path, change: tuple[str, float, int]) -> None:
        check_tar_bytes(root, good, change)

    def test_a_member_whose_name_holds_a_line_end(self, copied: Path) -> None:
        with (copied / "train-000001.tar").open("r+b") as file:
            file.write(member_header("a\nb", 3))
        assert "a\\nb" in str(verify_shards(copied)[0])
        assert holds_up(copied)  # readers do not look at headers
