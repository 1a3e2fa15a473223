"""The inspector as a user runs it: what the table says, and pictures that are there, whole, and of the right colours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from pipelines.format import ShardSet, open_shards
from tests import commands
from tests.pipelines.format.folders import read_json, write_folder, write_json

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cwd: Path, code: str = "", columns: int = 80) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "tools" / "inspect_shards.py")
    if not code:
        return commands.run(*arguments, cwd=cwd, program=script, variables={"COLUMNS": str(columns)})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns)}
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def inspector() -> ModuleType:
    spec = spec_from_file_location("inspect_shards", ROOT / "tools" / "inspect_shards.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("good") / "shards")


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def holds_colour(pixels: np.ndarray, colour: str) -> bool:
    return bool((pixels == np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])).all(-1).any())


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_counts_what_is_there(good: Path, columns: int) -> None:
    found = run("shards", cwd=good.parent, columns=columns)
    assert (found.returncode, found.stderr) == (0, "")
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in found.stdout.splitlines() if "│" in line
    }
    assert rows["train"][:3] == ["18", "3", "4"]
    assert rows["train"][5] == "44×39"
    assert rows["val"] == ["0", "", "", "", "", ""]
    assert rows["class-balanced"] == ["18", "6", "6", "virtual"]
    assert rows["square-root"][:3] == ["18", "7", "5"]
    assert "training images a class: 9 … 3, imbalance factor 3" in found.stdout
    assert "classes by training images: 0 many, 0 medium, 3 few" in found.stdout
    assert "pixels: keep, JPEG quality 95 where re-encoded, every image decoded" in found.stdout
    assert "images re-encoded: 0, skipped: 1" in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= columns


def test_pictures_show_the_groups_and_are_drawn_whole(good: Path, tmp_path: Path) -> None:
    before = sorted(good.iterdir())
    found = run(str(good), "--out", "figures/new", "--samples", "3", "--split", "test", cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines()[-2:] == ["drew figures/new/histogram.png", "drew figures/new/contact_sheet.png"]
    assert sorted(path.name for path in (tmp_path / "figures" / "new").iterdir()) == ["contact_sheet.png", "histogram.png"]
    histogram, sheet = (pixels_of(tmp_path / "figures" / "new" / name) for name in ("histogram.png", "contact_sheet.png"))
    assert histogram.shape == (672, 1200, 3)
    assert [holds_colour(histogram, colour) for colour in ("#3f6fb0", "#dd9a2f", "#b0435c")] == [False, False, True]  # few alone
    assert [holds_colour(sheet, colour) for colour in ("#3f6fb0", "#dd9a2f", "#b0435c")] == [True, True, True]  # every band has its mark
    assert sorted(good.iterdir()) == before


def test_the_contact_sheet_shows_the_images_themselves(inspector: ModuleType, make_shards: Callable[..., ShardSet]) -> None:
    """Tiles are the stored images, letterboxed, in the place of their class."""
    shards = make_shards(train=(120, 30, 4), size=(40, 80), extension="png", name="folder")
    sheet = np.asarray(inspector.draw_contact_sheet(shards, "train", 1))
    split = shards.split("train")
    band = inspector._TITLE_HEIGHT + inspector._CELL + 3 * inspector._LINE_HEIGHT + 8 + inspector._GAP
    for number, label in enumerate((0, 1, 2)):
        top, left, side = inspector._MARGIN + number * band + inspector._TITLE_HEIGHT, inspector._MARGIN, inspector._CELL
        tile = sheet[top : top + side, left : left + side]
        sample_id = int(np.flatnonzero(split.labels_N == label)[0])
        expected = inspector._tile(split.encoded(np.array([sample_id]))[0].tobytes(), side)
        assert np.array_equal(tile, np.asarray(expected))
        assert (tile[: side // 5] == 0xE9).all()  # twice as wide as high: bars above and below
        assert (tile[side // 2] != 0xE9).any()


NAMES = [
    "$x_1$ ünïcødé Ω",
    "鸟类",
    "two\nlines\t",
    "Plantae_Tracheophyta_Asterales_Asteraceae_Helianthus_annuus",
    "W" * 300,
    "caf\udce9",
    "",
    "[bold]",
]


def test_any_class_name_can_be_shown(tmp_path: Path, make_shards: Callable[..., ShardSet]) -> None:
    root = Path(shutil.copytree(make_shards(train=(120, 60, 30, 25, 9, 5, 2, 1), test=1).root, tmp_path / "shards"))
    manifest = read_json(root)
    write_json(root, {**manifest, "class_names": NAMES, "dataset": "$\\frac{[red]\n"})
    found = run("shards", "--out", "figures", cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    sheet = pixels_of(tmp_path / "figures" / "contact_sheet.png")
    assert (sheet[:, -20:] == 255).all()  # nothing runs over the margin


def test_thousands_of_classes_empty_groups_and_undecodable_images(inspector: ModuleType, tmp_path: Path) -> None:
    num_classes = 8142
    index = np.zeros(2 * num_classes, open_index_dtype())
    index["label"], index["offset"], index["size"], index["height"], index["width"] = np.arange(len(index)) // 2, 512, 100, 9, 9
    np.save(tmp_path / "train.index.npy", index)
    np.save(tmp_path / "none.index.npy", index[:0])
    (tmp_path / "train-000000.tar").write_bytes(bytes(10_240))
    shard = {"file": "train-000000.tar", "num_samples": len(index), "shard_bytes": 10_240, "sha256": "0" * 64}
    train = {"num_samples": len(index), "class_counts": [2] * num_classes, "shards": [shard]}
    train["index"] = {"file": "train.index.npy", "sha256": "0" * 64}
    empty = {"num_samples": 0, "class_counts": [0] * num_classes, "shards": []}
    splits = {"train": train} | {name: {**empty, "index": {"file": f"{name}.index.npy", "sha256": "0" * 64}} for name in ("val", "test")}
    names = [str(k) for k in range(num_classes)]
    content = {"format": "bce3s-shards", "version": 1, "dataset": "x", "class_names": names, "splits": splits}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    for name in ("val", "test"):
        shutil.copy(tmp_path / "none.index.npy", tmp_path / f"{name}.index.npy")
    shards = open_shards(tmp_path)
    assert "16,284" in str(inspector.splits_table(shards).columns[1]._cells)
    assert len(inspector.draw_histogram(shards).axes[0].get_legend().get_texts()) == 1
    sheet = inspector.draw_contact_sheet(shards, "train", 4)
    assert sheet.height < 700  # two of three bands have only their title


def open_index_dtype() -> np.dtype:
    from pipelines.format import INDEX_DTYPE

    return INDEX_DTYPE


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent"], "no shards at absent"),
        (["shards", "--split", "dev"], "unknown split 'dev'; known: train, val, test"),
        (["shards", "--out", "figures", "--split", "val"], "split 'val' of shards has no images to show"),
        (["shards", "--out", "shards/figures"], "--out shards/figures lies in the shard folder"),
        (["shards", "--out", "file/figures"], "cannot write to file/figures"),
        (["shards", "--samples", "0"], "--samples must lie in 1…25, not 0"),
    ],
)
def test_a_mistake_is_one_sentence(good: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "shards").symlink_to(good)
    (tmp_path / "file").write_text("")
    found = run(*arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert len(found.stderr.strip().splitlines()) == 1, found.stderr
    assert sentence in found.stderr
    assert not (tmp_path / "figures").exists()


def test_without_matplotlib_the_table_still_stands_and_pictures_name_the_package(good: Path, tmp_path: Path) -> None:
    script = ROOT / "tools" / "inspect_shards.py"
    code = f"import runpy, sys; sys.modules['matplotlib'] = None; sys.argv[0] = 'x'; runpy.run_path({str(script)!r}, run_name='__main__')"
    assert run(str(good), cwd=tmp_path, code=code).returncode == 0
    found = run(str(good), "--out", "figures", cwd=tmp_path, code=code)
    assert found.returncode == 2
    assert "pip install 'bce3s[report]'" in found.stderr
    assert not (tmp_path / "figures").exists()
