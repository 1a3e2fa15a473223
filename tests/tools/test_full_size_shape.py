"""Data sets in the published form at a hundredth of their size: every class, the true long tail, the lists as they are spelled."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.config import OrderConfig
from pipelines.datasets import exponential_counts
from pipelines.format import ShardSet, open_shards
from pipelines.order import ClassTable, draw_samples
from tests.conftest import SHARED_DATA
from tests.pipelines.datasets.published import write_list
from tests.tools.conversions import ROOT, must_convert, tool_environment


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of a few kilobytes: real ones made small, or noise where there are none."""
    folder = tmp_path_factory.mktemp("photos")
    originals = sorted((SHARED_DATA / "photos").glob("*.JPEG"))[:100]
    for number, original in enumerate(originals):
        with Image.open(original) as image:
            image.draft("RGB", (64, 64))
            image.convert("RGB").resize((64, 48)).save(folder / f"{number}.jpg")
    if not originals:
        rng = np.random.default_rng(0)
        for number in range(20):
            Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published lists, or, where they are absent, made-up ones of the same form with exponential tails."""
    if SHARED_DATA.is_dir():
        return SHARED_DATA / "lists"
    folder = tmp_path_factory.mktemp("lists")
    wnids = [f"n{label:08d}" for label in range(1000)]
    counts_K = exponential_counts(572, 1000, 114).tolist()
    write_list(folder / "ImageNet_LT_train.txt", _numbered("train/{0}/{0}_{1}.JPEG", wnids, counts_K))
    write_list(folder / "ImageNet_LT_val.txt", _numbered("train/{0}/{0}_9{1:04d}.JPEG", wnids, [20] * 1000))
    write_list(folder / "ImageNet_LT_test.txt", _numbered("val/{0}/ILSVRC2012_val_{0}{1}.JPEG", wnids, [50] * 1000))
    write_list(folder / "iNaturalist18_val.txt", _numbered("train_val2018/Life/{0}/9{1:031x}.jpg", range(8142), [3] * 8142))
    (folder / "iNaturalist18_train_counts.json").write_text(json.dumps(exponential_counts(275, 8142, 137).tolist()))
    categories = [{"id": label, "name": f"species {label}", "supercategory": "Life"} for label in range(8142)]
    (folder / "categories.json").write_text(json.dumps(categories))
    return folder


def _numbered(form: str, classes: Iterable[object], counts_K: Iterable[int]) -> list[tuple[str, int]]:
    places = enumerate(zip(classes, counts_K, strict=True))
    return [(form.format(name, number), label) for label, (name, count) in places for number in range(count)]


def build(dataset: str, folder: Path, photos: Path, lists: Path) -> Path:
    """The link farm of one data set, a hundredth of it."""
    arguments = [dataset, "farm", "--photos", str(photos), "--lists", str(lists), "--fraction", "0.01"]
    command = [sys.executable, str(ROOT / "benchmarks" / "link_farm.py"), *arguments]
    subprocess.run(command, cwd=folder, env=tool_environment(), check=True, capture_output=True)
    return folder / "farm"


def convert_farm(dataset: str, folder: Path) -> ShardSet:
    source = ("--dataset", dataset, "--source", "farm", "--lists", "farm")
    must_convert(*source, "--out", "out", "--keep", "--no-validate", "--shard-bytes", "4MiB", cwd=folder)
    return open_shards(folder / "out")


def assert_balanced_draws(shards: ShardSet) -> None:
    """A class-balanced epoch gives every class its equal share to within one."""
    table = ClassTable.of(shards.split("train").labels_N, len(shards.class_names))
    config = OrderConfig(sampling="class-balanced", draw="systematic")
    drawn = draw_samples(table, config, key=1, length=shards.num_samples("train"))
    shares_K = np.bincount(shards.split("train").labels_N[drawn], minlength=len(shards.class_names))
    assert shares_K.max() - shares_K.min() <= 1


def test_imagenet_lt_in_its_published_form(tmp_path: Path, photos: Path, lists: Path) -> None:
    farm = build("imagenet-lt", tmp_path, photos, lists)
    shards = convert_farm("imagenet-lt", tmp_path)
    assert len(shards.class_names) == 1000
    assert list(shards.class_names) == sorted(shards.class_names)
    for split in ("train", "val", "test"):
        lines = (farm / f"ImageNet_LT_{split}.txt").read_text().splitlines()
        counts = Counter(int(line.split()[1]) for line in lines)
        assert shards.class_counts(split).tolist() == [counts[label] for label in range(1000)]
        assert shards.manifest["splits"][split]["num_samples"] == len(lines)
    counts_K = shards.class_counts("train")
    assert counts_K.min() == 1
    assert counts_K.max() > 5  # 1,280 images at full size
    assert_balanced_draws(shards)


def test_inat18_in_its_published_form(tmp_path: Path, photos: Path, lists: Path) -> None:
    farm = build("inat18", tmp_path, photos, lists)
    shards = convert_farm("inat18", tmp_path)
    assert len(shards.class_names) == 8142
    for split, file in (("train", "train2018.json"), ("test", "val2018.json")):
        counts = Counter(entry["category_id"] for entry in json.loads((farm / file).read_bytes())["annotations"])
        assert shards.class_counts(split).tolist() == [counts[label] for label in range(8142)]
    assert shards.num_samples("val") == 0
    assert shards.class_counts("train").min() == 1
    assert_balanced_draws(shards)
