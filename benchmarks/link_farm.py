"""A source folder with the names, lists and class counts of a published data set, made of links to a few photographs.

python benchmarks/link_farm.py imagenet-lt FARM --photos DIR --lists DIR [--fraction 0.01]
python benchmarks/link_farm.py inat18      FARM --photos DIR --lists DIR [--fraction 0.01]

`--lists` holds the split lists (xz or plain): ImageNet_LT_{train,val,test}.txt; iNaturalist18_val.txt, categories.json and
iNaturalist18_train_counts*.json (training images of each category). A train list whose file names are made up does as well.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import typer

from bce3s.cli import run_app
from pipelines.types import DatasetError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Photos = Annotated[Path, typer.Option(help="A folder of JPEG files to link to.")]
Lists = Annotated[Path, typer.Option(help="A folder of published lists.")]
Fraction = Annotated[float, typer.Option(help="Share of each class, at least one image.")]


def read_text(folder: Path, pattern: str) -> str:
    """The one file of `folder` that fits `pattern`, perhaps compressed."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise DatasetError(f"{folder} holds no {pattern}: name the folder of the lists with --lists")
    content = found[0].read_bytes()
    return (lzma.decompress(content) if found[0].suffix == ".xz" else content).decode()


def new_folder(farm: Path) -> None:
    """Makes the folder; what stands there already is not ours to mix with."""
    if farm.exists():
        raise DatasetError(f"{farm} exists already: remove it or name another folder")
    farm.mkdir(parents=True)


def thinned(lines: Iterable[str], fraction: float) -> list[str]:
    """The first `fraction` of the lines of each label, at least one."""
    by_label: dict[str, list[str]] = {}
    for line in lines:
        by_label.setdefault(line.rsplit(maxsplit=1)[1], []).append(line)
    return [line for found in by_label.values() for line in found[: max(1, round(fraction * len(found)))]]


def link(root: Path, names: Iterable[str], photos: Path) -> int:
    """Links every name below `root` to the next photograph; returns how many."""
    targets = cycle(sorted(str(path.resolve()) for path in photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg")))
    folders: set[str] = set()
    count = 0
    for name, target in zip(names, targets, strict=False):
        folder, _, _ = name.rpartition("/")
        if folder not in folders:
            os.makedirs(root / folder, exist_ok=True)
            folders.add(folder)
        os.symlink(target, f"{root}/{name}")
        count += 1
    return count


@app.command("imagenet-lt")
def imagenet_lt(farm: Path, photos: Photos, lists: Lists, fraction: Fraction = 1.0) -> None:
    """train/<wnid>/, val/<wnid>/ and the three lists."""
    new_folder(farm)
    names: dict[str, None] = {}
    for split in ("train", "val", "test"):
        lines = thinned(read_text(lists, f"ImageNet_LT_{split}*.txt*").splitlines(), fraction)
        (farm / f"ImageNet_LT_{split}.txt").write_text("\n".join(lines) + "\n")
        names |= dict.fromkeys(line.split()[0] for line in lines)
    print(f"{link(farm, names, photos):,} links in {farm}")


@app.command("inat18")
def inat18(farm: Path, photos: Photos, lists: Lists, fraction: Fraction = 1.0) -> None:
    """train_val2018/<supercategory>/<category>/ and train2018.json, val2018.json in the competition's form."""
    new_folder(farm)
    categories = json.loads(read_text(lists, "categories.json*"))
    counts = json.loads(read_text(lists, "iNaturalist18_train_counts*.json*"))
    val = [line.split()[0] for line in thinned(read_text(lists, "iNaturalist18_val.txt*").splitlines(), fraction)]
    train = [
        f"train_val2018/{category['supercategory']}/{category['id']}/{number:032x}.jpg"
        for category in categories
        for number in range(max(1, round(fraction * counts[category["id"]])))
    ]
    count = 0
    for name, paths in (("train", train), ("val", val)):
        annotations: dict[str, Any] = {
            "categories": categories,
            "images": [{"id": number, "file_name": path} for number, path in enumerate(paths)],
            "annotations": [
                {"id": number, "image_id": number, "category_id": int(path.split("/")[2])} for number, path in enumerate(paths)
            ],
        }
        (farm / f"{name}2018.json").write_text(json.dumps(annotations))
        count += link(farm, paths, photos)
    print(f"{count:,} links in {farm}")


if __name__ == "__main__":
    run_app(app)
