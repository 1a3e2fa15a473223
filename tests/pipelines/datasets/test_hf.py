"""Hugging Face's layouts, written by their own library: bytes untouched, splits as for `folder`, no network, nothing beside the source."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.datasets import DatasetOptions, class_counts, open_dataset
from pipelines.types import SPLITS, BackendError, ConfigError, DatasetError, OpenDataset
from tests.pipelines.datasets.published import jpeg, samples, write_tree

datasets = pytest.importorskip("datasets")

NAMES = ("wasp", "ant", "bee")  # not sorted: a ClassLabel keeps its own order
TRAIN = [(jpeg(number), number % 3) for number in range(12)]
TEST = [(jpeg(100 + number), 2 - number % 3) for number in range(6)]


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of our own, and an error wherever the network is tried."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"the network was tried: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def _table(rows: list[tuple[bytes, Any]], label: Any = None, **columns: Any) -> Any:
    features = datasets.Features({"image": datasets.Image(), "label": label or datasets.ClassLabel(names=NAMES)} | columns)
    content = {
        "image": [{"bytes": encoded, "path": f"{row}.jpg" if row % 2 else None} for row, (encoded, _) in enumerate(rows)],
        "label": [value for _, value in rows],
    }
    return datasets.Dataset.from_dict(content | {name: [0] * len(rows) for name in columns}, features=features)


def _parquet(root: Path, test: str = "test") -> Path:
    (root / "data").mkdir(parents=True)
    _table(TRAIN[:7]).to_parquet(root / "data/train-00000-of-00002.parquet")
    _table(TRAIN[7:]).to_parquet(root / "data/train-00001-of-00002.parquet")
    _table(TEST).to_parquet(root / f"data/{test}-00000-of-00001.parquet")
    return root


def _plain_parquet(root: Path) -> Path:
    """As pandas writes it: no note of what the columns are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    for split, rows in (("train", TRAIN), ("test", TEST)):
        images = [{"bytes": encoded, "path": f"{row}.jpg"} for row, (encoded, _) in enumerate(rows)]
        pq.write_table(pa.table({"image": images, "label": [NAMES[label] for _, label in rows]}), root / f"{split}.parquet")
    return root


def _saved(root: Path) -> Path:
    datasets.DatasetDict({"train": _table(TRAIN), "test": _table(TEST)}).save_to_disk(root)
    return root


def _saved_shuffled(root: Path) -> Path:
    rows = _table(TRAIN[::-1]).select(range(11, -1, -1))
    datasets.DatasetDict({"train": rows, "test": _table(TEST)}).save_to_disk(root)
    return root


def _imagefolder(root: Path) -> Path:
    for split, rows in (("train", TRAIN), ("test", TEST)):
        write_tree(root / split, {f"{NAMES[label]}/{number:03d}.jpg": encoded for number, (encoded, label) in enumerate(rows)})
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "parquet": _parquet,
    "plain parquet": _plain_parquet,
    "saved": _saved,
    "saved shuffled": _saved_shuffled,
    "imagefolder": _imagefolder,
}


def _open(source: Path, **options: Any) -> OpenDataset:
    return open_dataset("hf", DatasetOptions(source=source, **options))


def _named(dataset: OpenDataset, split: str) -> list[tuple[str, bytes]]:
    return sorted((dataset.class_names[label], encoded) for _, label, encoded in samples(dataset, split))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bytes_under_the_same_names(tmp_path: Path, layout: str) -> None:
    source = LAYOUTS[layout](tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    dataset = _open(source, val_fraction=0.0)
    assert _named(dataset, "train") == sorted((NAMES[label], encoded) for encoded, label in TRAIN)
    assert _named(dataset, "test") == sorted((NAMES[label], encoded) for encoded, label in TEST)
    assert len(dataset.splits["val"].labels_N) == 0
    assert dataset.class_names == (NAMES if layout in ("parquet", "saved", "saved shuffled") else tuple(sorted(NAMES)))
    assert all(split.labels_N.dtype == np.int64 for split in dataset.splits.values())
    assert dataset.complaints == ()
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_keep_their_order_and_say_where_they_are(tmp_path: Path) -> None:
    dataset = _open(_parquet(tmp_path / "source"), val_fraction=0.0)
    assert [sample[1:] for sample in samples(dataset, "train")] == [(label, encoded) for encoded, label in TRAIN]
    assert dataset.splits["train"].sources[8] == f"{tmp_path}/source/train#8"


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_missing_splits_are_taken_from_train_and_named_ones_are_found(tmp_path: Path, name: str) -> None:
    dataset = _open(datasets_with(tmp_path / "source", train=TRAIN, **{name: TEST}), test_fraction=0.25)
    assert [class_counts(dataset.splits[split].labels_N, 3).tolist() for split in SPLITS] == [[3, 3, 3], [2, 2, 2], [1, 1, 1]]
    assert dataset.options["test_fraction"] == 0.25
    everything = [encoded for split in ("train", "test") for _, _, encoded in samples(dataset, split)]
    assert sorted(everything) == sorted(encoded for encoded, _ in TRAIN)
    with pytest.raises(ConfigError, match=rf"val_fraction splits images off train, but split val of {tmp_path}/source is there"):
        _open(tmp_path / "source", val_fraction=0.1)


def datasets_with(root: Path, **splits: list[tuple[bytes, Any]]) -> Path:
    datasets.DatasetDict({name: _table(rows) for name, rows in splits.items()}).save_to_disk(root)
    return root


def test_a_single_saved_split_is_train_and_takes_a_long_tail(tmp_path: Path) -> None:
    _table(TRAIN * 4).save_to_disk(tmp_path / "source")
    dataset = _open(tmp_path / "source", imbalance_factor=4, val_fraction=0.0, test_fraction=0.0)
    assert class_counts(dataset.splits["train"].labels_N, 3).tolist() == [16, 8, 4]


@pytest.mark.parametrize(
    ("values", "feature", "names"),
    [
        ([7, -2, 7, 10], "int32", ("-2", "7", "10")),
        (["b", "a", "b", "c"], "string", ("a", "b", "c")),
        ([True, False, True, True], "bool", None),
        ([0.5, 1.0, 0.5, 0.5], "float32", None),
    ],
)
def test_integers_and_text_are_labels_in_sorted_order(
    tmp_path: Path, values: list[Any], feature: str, names: tuple[str, ...] | None
) -> None:
    _table([(jpeg(row), value) for row, value in enumerate(values)], datasets.Value(feature)).save_to_disk(tmp_path / "source")
    if names is None:
        with pytest.raises(DatasetError, match=r"source/train#0 has the label (True|0\.5), which is no class of train"):
            _open(tmp_path / "source")
        return
    dataset = _open(tmp_path / "source", val_fraction=0.0, test_fraction=0.0)
    assert dataset.class_names == names
    assert [names[label] for label in dataset.splits["train"].labels_N] == [str(value) for value in values]


def test_a_class_without_images_is_a_complaint(tmp_path: Path) -> None:
    dataset = _open(datasets_with(tmp_path / "source", train=[row for row in TRAIN if row[1] != 1], test=TEST))
    assert dataset.class_names == NAMES
    assert dataset.complaints == (f"1 of 3 classes have no training image in {tmp_path}/source, the first is ant",)


def _renamed(root: Path, **names: str) -> Path:
    _table(TRAIN).rename_columns(names).save_to_disk(root)
    return root


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda root: root.mkdir(), "the datasets library cannot open {root} ("),
    "no images": (lambda root: write_tree(root, {"a.txt": b"x"}), "{root} has no one image column"),
    "damaged": (lambda root: write_tree(root, {"data/train-0.parquet": b"no parquet"}), "the datasets library cannot open {root} ("),
    "no train": (lambda root: datasets_with(root, test=TEST), "{root} has no train split with images (its splits: test)"),
    "two vals": (
        lambda root: datasets_with(root, train=TRAIN, val=TEST, validation=TEST),
        "{root} has the splits val and validation: keep one of them as the val split",
    ),
    "unlabelled": (
        lambda root: datasets_with(root, train=TRAIN, test=[TEST[0], (jpeg(0), -1)]),
        "{root}/test#1 has the label -1, which is no class of train: remove the split, or label it",
    ),
    "null": (lambda root: datasets_with(root, train=[*TRAIN, (jpeg(0), None)]), "{root}/train#12 has the label None, which is no class"),
    "no image column": (
        lambda root: _table(TRAIN).remove_columns("image").save_to_disk(root),
        "{root} has no one image column (its columns",
    ),
    "no label column": (
        lambda root: _renamed(root, label="id") and _retyped(root),
        "{root} has no one label column (its columns: image, ",
    ),
    "another column": (
        lambda root: datasets.DatasetDict({"train": _table(TRAIN), "test": _table(TEST).rename_column("label", "fine")}).save_to_disk(root),
        "{root}/test has no column 'label', which train has",
    ),
}


def _retyped(root: Path) -> None:
    table = datasets.load_from_disk(root).cast_column("id", datasets.Value("int64")).flatten_indices(keep_in_memory=True)
    table.save_to_disk(root.with_name("typed"))
    root.rename(root.with_name("before"))
    root.with_name("typed").rename(root)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_used_is_one_sentence(tmp_path: Path, fault: str) -> None:
    make, sentence = FAULTS[fault]
    make(tmp_path / "source")
    with pytest.raises(DatasetError) as error:
        _open(tmp_path / "source")
    assert str(error.value).startswith(sentence.format(root=tmp_path / "source"))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("photo", "kind"), ("image", "labels")])
def test_columns_of_other_names_are_found(tmp_path: Path, image: str, label: str) -> None:
    dataset = _open(_renamed(tmp_path / "source", image=image, label=label), val_fraction=0.0, test_fraction=0.0)
    assert [encoded for _, _, encoded in samples(dataset, "train")] == [encoded for encoded, _ in TRAIN]


def test_a_path_that_leaves_the_data_set_is_refused_and_a_file_that_went_away_named(tmp_path: Path) -> None:
    source = _imagefolder(tmp_path / "source")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": path} for path in ("../secret.jpg", str(tmp_path / "secret.jpg"), "train/ant/001.jpg", None)]},
        features=datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}),
    ).add_column("label", [0, 1, 2, 3])
    (tmp_path / "pointers").mkdir()
    table.to_parquet(tmp_path / "pointers/train.parquet")
    write_tree(tmp_path / "pointers", {"train/ant/001.jpg": TRAIN[1][0]})
    (tmp_path / "pointers" / "train").rename(tmp_path / "pointers" / "files")
    split = _open(tmp_path / "pointers", val_fraction=0.0, test_fraction=0.0).splits["train"]
    for row, reason in ((0, "leaves the data set"), (1, "leaves the data set"), (2, "No such file"), (3, "neither bytes nor a path")):
        with pytest.raises(DatasetError, match=rf"cannot read {tmp_path}/pointers/train#{row} \(.*{reason}"):
            split.read(row)
    (tmp_path / "pointers" / "files").rename(tmp_path / "pointers" / "train")
    assert split.read(2).encoded == TRAIN[1][0]
    folder = _open(source, val_fraction=0.0).splits["test"]
    (source / "test/ant/001.jpg").unlink()
    with pytest.raises(DatasetError, match=r"cannot read .*source/test#0 \(No such file"):
        folder.read(0)


def test_file_names_that_are_not_utf8_are_one_sentence(tmp_path: Path) -> None:
    source = _imagefolder(tmp_path / "source")
    os.rename(source / "train/ant/001.jpg", os.path.join(os.fsencode(source), b"train/ant/caf\xe9.jpg"))
    with pytest.raises(DatasetError, match=r"the datasets library cannot open .*source \('utf-?8' codec can't encode") as error:
        _open(source)
    assert str(error.value).isprintable()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("layout", ["parquet", "imagefolder"])
def test_reads_from_threads_and_forked_processes_agree(tmp_path: Path, layout: str) -> None:
    split = _open(LAYOUTS[layout](tmp_path / "source"), val_fraction=0.0).splits["train"]

    def digest(_: int = 0) -> list[bytes]:
        return [split.read(row % 12).encoded for row in range(60)]

    alone = digest()
    with ThreadPoolExecutor(4) as pool:
        assert all(found == alone for found in pool.map(digest, range(8)))
    context = get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=lambda: queue.put(pickle.dumps(digest()))) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [pickle.loads(queue.get(timeout=60)) for _ in workers] == [alone] * 2
    for worker in workers:
        worker.join()


def test_settings_of_the_library_are_as_before_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _parquet(tmp_path / "source")
    datasets.enable_progress_bars()
    capfd.readouterr()
    before = datasets.config.HF_HUB_OFFLINE
    _open(tmp_path / "source")
    assert datasets.config.HF_HUB_OFFLINE == before
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


def test_data_elsewhere_is_not_fetched(tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files: https://huggingface.co/datasets/x/y/resolve/main/train.parquet\n---\n"
    write_tree(tmp_path / "source", {"README.md": card.encode()})
    with pytest.raises(DatasetError, match="the datasets library cannot open"):
        _open(tmp_path / "source")


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BackendError, match=r"data set 'hf' needs the package datasets: pip install 'bce3s\[hf\]'"):
        _open(tmp_path)
