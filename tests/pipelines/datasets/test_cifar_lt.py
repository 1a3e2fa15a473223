"""CIFAR-LT: the official pickles, safely read; the subset, the val split, and the real files where they are at hand."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.datasets import DatasetOptions, class_counts, exponential_counts, open_dataset
from pipelines.datasets.cifar_pickle import load_cifar_pickle
from pipelines.types import ConfigError, DatasetError, OpenDataset

REAL_DATA = Path(__file__).parents[4] / "shared" / "data"


def _python2_pickle(labels: list[int], pixels: NDArray[np.uint8]) -> bytes:
    """What Python 2 wrote: byte strings, `numpy.core`, and 0 and 1 for the booleans of dtype."""

    def text(value: bytes) -> bytes:
        return b"U" + struct.pack("<B", len(value)) + value

    dtype = (
        b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN" + (b"J" + struct.pack("<i", -1)) * 2 + b"K\x00tb"
    )
    shape = b"".join(b"M" + struct.pack("<H", side) for side in pixels.shape)
    content = b"T" + struct.pack("<i", pixels.size) + pixels.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t"
        + text(b"b")
        + b"tR(K\x01("
        + shape
        + b"t"
        + dtype
        + b"\x89"
        + content
        + b"tb"
    )
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"fine_labels") + listed + b"u."


def _labels(counts: dict[int, int], seed: int = 0) -> list[int]:
    labels = np.repeat(list(counts), list(counts.values()))
    return np.random.default_rng(seed).permutation(labels).tolist()


def _write(path: Path, labels: list[int], key: bytes, seed: int = 0) -> None:
    """Rows that differ in their first eight pixels only, so that files are quick to make."""
    pixels = np.zeros((len(labels), 3072), np.uint8)
    pixels[:, :8] = np.random.default_rng(seed).integers(0, 256, (len(labels), 8))
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(pickle.dumps({b"data": pixels, key: labels}, protocol=2))


@pytest.fixture(scope="module")
def cifar100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train set of three classes, named like the first of CIFAR-100, 500 images each, and a test set of 2 each."""
    folder = tmp_path_factory.mktemp("cifar") / "cifar-100-python"
    _write(folder / "train", _labels({0: 500, 1: 500, 2: 500}), b"fine_labels")
    _write(folder / "test", [2, 1, 0, 0, 1, 2], b"fine_labels", seed=1)
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"apple", b"fish", b"baby"]}, protocol=2))
    return folder


def _open(source: Path, name: str = "cifar100-lt", **options: object) -> OpenDataset:
    return open_dataset(name, DatasetOptions(source=source, **options))  # type: ignore[arg-type]


def _rows(dataset: OpenDataset, split: str) -> list[int]:
    return [int(dataset.splits[split].read(index).source.split("#")[1]) for index in range(len(dataset.splits[split].labels_N))]


def test_first_images_of_each_class_in_file_order(cifar100: Path) -> None:
    dataset = _open(cifar100.parent, imbalance_factor=25)
    labels_N = np.array(load_cifar_pickle(cifar100 / "train")[b"fine_labels"])
    expected = np.concatenate([np.flatnonzero(labels_N == label)[:count] for label, count in enumerate((500, 100, 20))])
    assert _rows(dataset, "train") == sorted(expected.tolist())
    assert dataset.class_names == ("apple", "fish", "baby")
    assert dataset.options == {"imbalance_factor": 25, "subset": "first", "val_per_class": 0}
    assert len(dataset.splits["val"].labels_N) == 0
    assert dataset.splits["test"].labels_N.tolist() == [2, 1, 0, 0, 1, 2]


def test_the_folder_itself_is_a_source_too(cifar100: Path) -> None:
    assert _rows(_open(cifar100), "train") == _rows(_open(cifar100.parent), "train")


def test_pixels_survive(cifar100: Path) -> None:
    test, pixels_NP = _open(cifar100).splits["test"], load_cifar_pickle(cifar100 / "test")[b"data"]
    for index in range(len(test.labels_N)):
        sample = test.read(index)
        image_HWC = np.asarray(Image.open(io.BytesIO(sample.encoded)))
        assert image_HWC.transpose(2, 0, 1).tobytes() == pixels_NP[index].tobytes()
        assert (sample.extension, sample.source) == ("png", f"{cifar100 / 'test'}#{index}")
    assert test.read(0).encoded == test.read(0).encoded


def test_seeded_subsets(cifar100: Path) -> None:
    draws = [_rows(_open(cifar100, subset="seeded", seed=seed), "train") for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert _open(cifar100, subset="seeded").options["seed"] == 0


@pytest.mark.parametrize("subset", ["first", "seeded"])
def test_val_takes_the_last_images_of_each_class(cifar100: Path, subset: str) -> None:
    dataset = _open(cifar100, val_per_class=30, imbalance_factor=10, subset=subset)
    labels_N = np.array(load_cifar_pickle(cifar100 / "train")[b"fine_labels"])
    assert _rows(dataset, "val") == sorted(np.concatenate([np.flatnonzero(labels_N == label)[-30:] for label in range(3)]).tolist())
    assert not set(_rows(dataset, "val")) & set(_rows(dataset, "train"))
    assert class_counts(dataset.splits["train"].labels_N, 3).tolist() == exponential_counts(470, 3, 10).tolist()
    with pytest.raises(ConfigError, match="val_per_class must be below the 500 images of a class, not 500"):
        _open(cifar100, val_per_class=500)


def test_too_few_images_of_a_class_are_named(cifar100: Path, tmp_path: Path) -> None:
    for name in ("meta", "test"):
        (tmp_path / name).write_bytes((cifar100 / name).read_bytes())
    _write(tmp_path / "train", _labels({0: 500, 1: 40, 2: 5}), b"fine_labels")
    with pytest.raises(DatasetError) as error:
        _open(tmp_path, imbalance_factor=100)
    assert str(error.value).startswith(f"the subset asks for 50 images of class 'fish', but {tmp_path} has 40: unpack every train file")


def test_python2_pickles(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072)).astype(np.uint8)
    (tmp_path / "train").write_bytes(_python2_pickle([2, 0, 1], pixels))
    content = load_cifar_pickle(tmp_path / "train")
    assert content[b"fine_labels"] == [2, 0, 1]
    assert content[b"data"].dtype == np.uint8
    assert (content[b"data"] == pixels).all()


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_forged_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "meta"
    path.write_bytes(pickle.dumps({b"fine_label_names": _Evil(tmp_path / "ran")}, protocol=protocol))
    with pytest.raises(DatasetError) as error:
        load_cifar_pickle(path)
    asked = f"{os.system.__module__}.system"
    assert str(error.value) == f"{path} asks for '{asked}', which no CIFAR file needs: delete it and download it again"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "numpy.load", "numpy._core.multiarray.fromfile", "_codecs.decode", "numpy.core.os.system"]
)
def test_neighbours_of_the_admitted_names_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "meta"
    path.write_bytes(b"c" + "\n".join(name.rsplit(".", 1)).encode() + b"\n.")
    with pytest.raises(DatasetError, match=f"asks for '{name}'"):
        load_cifar_pickle(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.9999])
def test_a_file_cut_short_is_named(cifar100: Path, tmp_path: Path, share: float) -> None:
    whole = (cifar100 / "test").read_bytes()
    path = tmp_path / "test"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DatasetError) as error:
        load_cifar_pickle(path)
    assert str(error.value).startswith(f"{path} is damaged or cut short (")


@pytest.mark.parametrize("content", [b"not a pickle", b"\x80\x05\x8e" + b"\xff" * 8, b"(lp0\n.", b"I3\n."])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "meta").write_bytes(content)
    with pytest.raises(DatasetError, match=r"meta (is damaged|holds no dictionary)"):
        load_cifar_pickle(tmp_path / "meta")


@pytest.mark.parametrize(
    "content",
    [
        {b"labels": [0]},
        {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0]},
        {b"data": np.zeros((1, 3072), np.float32), b"fine_labels": [0]},
        {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [3]},
    ],
)
def test_strange_content_is_named(cifar100: Path, tmp_path: Path, content: dict[bytes, object]) -> None:
    (tmp_path / "meta").write_bytes((cifar100 / "meta").read_bytes())
    (tmp_path / "train").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DatasetError, match="train does not hold images and 'fine_labels' of 3 classes"):
        _open(tmp_path)


def test_missing_files_are_named(cifar100: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds no cifar-100-python/meta: unpack cifar-100-python\.tar\.gz there"):
        _open(tmp_path)
    (tmp_path / "meta").write_bytes((cifar100 / "meta").read_bytes())
    with pytest.raises(DatasetError, match="holds no train: unpack the archive"):
        _open(tmp_path)
    (tmp_path / "meta").write_bytes(pickle.dumps({b"label_names": []}))
    with pytest.raises(DatasetError, match="lists no class names under 'fine_label_names'"):
        _open(tmp_path)


@pytest.fixture(scope="session")
def real_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (REAL_DATA / "unpack.py").is_file():
        pytest.skip(f"needs the CIFAR archives beside the repository in {REAL_DATA}")
    folder = tmp_path_factory.mktemp("real")
    for name in ("cifar10", "cifar100"):
        subprocess.run([sys.executable, REAL_DATA / "unpack.py", name, folder], check=True, timeout=60)
    return folder


@pytest.mark.parametrize(
    ("name", "factor", "total", "num_classes"),
    [("cifar10-lt", 100, 12406, 10), pytest.param("cifar10-lt", 10, 20431, 10, marks=pytest.mark.slow), ("cifar100-lt", 100, 10847, 100)],
)
def test_real_cifar(real_cifar: Path, name: str, factor: float, total: int, num_classes: int) -> None:
    dataset = _open(real_cifar, name, imbalance_factor=factor)
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert len(dataset.class_names) == num_classes
    assert len(train.labels_N) == total
    assert class_counts(test.labels_N, num_classes).tolist() == [10_000 // num_classes] * num_classes
    means_C = [np.asarray(Image.open(io.BytesIO(train.read(index).encoded))).mean(axis=(0, 1)) for index in range(0, total, 50)]
    assert np.mean(means_C, axis=0) / 255 == pytest.approx([0.5, 0.49, 0.45], abs=0.04)


def test_real_cifar10_holds_no_more_than_factor_10(real_cifar: Path) -> None:
    with pytest.raises(DatasetError, match=r"the subset asks for 4181 images of class 'automobile', but .*cifar-10-batches-py has 3871"):
        _open(real_cifar, "cifar10-lt", imbalance_factor=5)


def test_the_first_classes_have_a_profile_of_their_own(cifar100: Path) -> None:
    whole, two = _open(cifar100), _open(cifar100, classes=2)
    assert two.class_names == ("apple", "fish")
    assert class_counts(two.splits["train"].labels_N, 2).tolist() == exponential_counts(500, 2, 100).tolist() == [500, 5]
    assert two.options == {"imbalance_factor": 100, "subset": "first", "val_per_class": 0, "classes": 2}
    assert "classes" not in whole.options  # shards of all classes have the manifest they always had
    # The same images of the first class, with the names and pixels they have in the whole set.
    assert list(two.splits["test"].sources) == [
        source for source, label in zip(whole.splits["test"].sources, whole.splits["test"].labels_N, strict=True) if label < 2
    ]
    rows = load_cifar_pickle(cifar100 / "test")[b"data"]
    for index, source in enumerate(two.splits["test"].sources):
        image_HWC = np.asarray(Image.open(io.BytesIO(two.splits["test"].read(index).encoded)))
        assert image_HWC.transpose(2, 0, 1).tobytes() == rows[int(source.split("#")[1])].tobytes()
    labels_N = np.array(load_cifar_pickle(cifar100 / "train")[b"fine_labels"])
    assert set(labels_N[_rows(two, "train")]) == {0, 1}
    assert class_counts(_open(cifar100, classes=2, val_per_class=30).splits["val"].labels_N, 2).tolist() == [30, 30]


def test_as_many_classes_as_there_are_at_most(cifar100: Path) -> None:
    with pytest.raises(ConfigError, match="classes must be at most the 3 of cifar100-lt, not 4"):
        _open(cifar100, classes=4)
    with pytest.raises(ConfigError, match="classes must be at least 2, not 1"):
        _open(cifar100, classes=1)
    with pytest.raises(ConfigError, match="data set 'demo' does not take classes"):
        open_dataset("demo", DatasetOptions(classes=2))
