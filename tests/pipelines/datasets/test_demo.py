"""The drawn demo set: the same bytes every time, drawn again when it is not whole, and never over other files."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.datasets import DatasetOptions, class_counts, demo, open_dataset
from pipelines.datasets.demo import CLASSES, MARKER, DemoSpec, open_drawn
from pipelines.datasets.demo_scene import FILLS, SHAPES, draw_scene
from pipelines.types import SPLITS, DatasetError

SMALL = DemoSpec(max_count=4, imbalance_factor=4, val_per_class=1, test_per_class=1)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "demo"
    open_drawn(folder, SMALL)
    return folder


def test_every_class_has_its_place(drawn: Path) -> None:
    assert sorted(CLASSES) == sorted((shape, fill) for shape in SHAPES for fill in FILLS)
    dataset = open_drawn(drawn, SMALL)
    assert len(dataset.class_names) == 20
    counts = dict(zip(dataset.class_names, class_counts(dataset.splits["train"].labels_N, 20).tolist(), strict=True))
    assert counts == SMALL.counts()["train"]
    assert [len(dataset.splits[split].labels_N) for split in SPLITS] == [sum(counts.values()), 20, 20]


def test_default_counts() -> None:
    counts = DemoSpec().counts()
    assert sum(counts["train"].values()) == 2105
    assert (max(counts["train"].values()), min(counts["train"].values())) == (400, 8)
    assert {*counts["val"].values()} == {10}
    assert {*counts["test"].values()} == {50}


def test_images_are_real_jpegs_of_varying_size(drawn: Path) -> None:
    train = open_drawn(drawn, SMALL).splits["train"]
    sizes = set()
    for index in range(len(train.labels_N)):
        sample = train.read(index)
        assert sample.extension == "jpg"
        with Image.open(io.BytesIO(sample.encoded)) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert all(64 <= side <= 80 for side in image.size)
            sizes.add(image.size)
    assert len(sizes) > 10


def test_the_same_spec_gives_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    open_drawn(tmp_path / "again", SMALL)
    assert _bytes(tmp_path / "again") == _bytes(drawn)


def test_a_picture_depends_on_nothing_but_its_own_key(drawn: Path, tmp_path: Path) -> None:
    open_drawn(tmp_path / "more", DemoSpec(max_count=5, imbalance_factor=5, val_per_class=1, test_per_class=1))
    more = _bytes(tmp_path / "more")
    assert all(more[name] == content for name, content in _bytes(drawn).items() if name.startswith("train/shaded-star/"))
    other = draw_scene("star", "shaded", np.random.Generator(np.random.PCG64(1)))
    assert other.tobytes() != draw_scene("star", "shaded", np.random.Generator(np.random.PCG64(2))).tobytes()


def test_a_whole_folder_is_reused(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "draw_folder", lambda *_: pytest.fail("drawn again"))
    open_drawn(drawn, SMALL)


@pytest.mark.parametrize("damage", ["version", "marker", "image", "class"])
def test_a_folder_that_is_not_whole_is_drawn_again(tmp_path: Path, drawn: Path, damage: str) -> None:
    folder = tmp_path / "demo"
    open_drawn(folder, SMALL)
    if damage == "version":
        (folder / MARKER).write_text(json.dumps(json.loads((folder / MARKER).read_text()) | {"version": -1}))
    elif damage == "marker":
        (folder / MARKER).write_text("{")
    elif damage == "image":
        (folder / "test/striped-bar/00000.jpg").unlink()
    else:
        os.rename(folder / "train/striped-bar", tmp_path / "elsewhere")
    open_drawn(folder, SMALL)
    assert _bytes(folder) == _bytes(drawn)
    assert {path.name for path in tmp_path.iterdir()} <= {"demo", "elsewhere"}


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = iter(range(5))

    def interrupt(shape: str, fill: str, rng: np.random.Generator) -> Image.Image:
        if next(pictures, None) is None:
            raise KeyboardInterrupt
        return draw_scene(shape, fill, rng)

    monkeypatch.setattr(demo, "draw_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_drawn(tmp_path / "demo", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DatasetError, match="holds something that is not the demo set: choose another folder with --source"):
        open_drawn(tmp_path, SMALL)
    assert (tmp_path / "thesis.tex").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"cannot draw the demo set in .*file/demo \(Not a directory\)"):
        open_drawn(tmp_path / "file/demo", SMALL)


def test_options_reach_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(demo, "open_drawn", lambda folder, spec: seen.append((folder, spec)))
    open_dataset("demo", DatasetOptions(source=tmp_path, imbalance_factor=10, seed=3))
    open_dataset("demo")
    assert seen == [(tmp_path, DemoSpec(imbalance_factor=10, seed=3)), (Path("data/demo"), DemoSpec())]
