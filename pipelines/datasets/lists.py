"""Published split lists: `path label` a line, checked in full before an image is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.datasets import DATASETS, DatasetOptions
from pipelines.datasets.files import printable
from pipelines.datasets.longtail import class_counts
from pipelines.types import DatasetError, IntArray


class PathFault(Exception):
    """Why a path is not taken, as the end of a sentence."""


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """One split, as published.

    Args:
        file: where it was read.
        paths: N relative paths with `/`, none twice, none leaving the folder they are relative to.
        labels_N: int64 [N], 0 ≤ label < the published number of classes.
        numbers_N: int64 [N], where in `file` each entry stands, counted in `unit`s.
        unit: "line", or "image" of a json file.
    """

    file: Path
    paths: list[str]
    labels_N: IntArray
    numbers_N: IntArray
    unit: str = "line"

    def where(self, row: int) -> str:
        """Names an entry: 'line 12 of lists/x.txt'."""
        return f"{self.unit} {self.numbers_N[row]} of {self.file}"


def lists_folder(options: DatasetOptions, *names: str) -> Path:
    """The folder of the lists `names`: `lists`, or where one of them lies beside or just above the images."""
    if options.lists is not None:
        return options.lists
    assert options.source is not None  # `open_dataset` asked for it
    folders = [options.source, options.source.parent] if options.source.is_dir() else [options.source.parent]
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), folders[0])


def read_bytes(file: Path) -> bytes:
    """The bytes of a list; `DatasetError` where it is missing or cannot be read."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{file.parent} holds no {file.name}: put it there, or name the folder of the lists with --lists") from None
    except OSError as error:
        raise DatasetError(f"cannot read {file} ({error.strerror}): make it readable and run the command again") from error


def read_list(file: Path, num_classes: int) -> ImageList:
    """Reads `path label` lines; blank lines, Windows line ends and a leading `./` are fine.

    Args:
        file: the list.
        num_classes: labels must lie below.

    Raises:
        DatasetError: the file is missing, empty or not UTF-8; a line has no label, one that is no integer or out of range, or a path that
            leaves its folder or came before. The sentence names file and line.
    """
    content = read_bytes(file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DatasetError(f"line {line} of {file} is not UTF-8: save the list as UTF-8, or fetch it again") from None
    paths, labels, lines = [], [], []
    for number, line_text in enumerate(text.split("\n"), 1):
        fields = line_text.rsplit(maxsplit=1)
        if not fields:
            continue
        try:
            if len(fields) == 1:
                raise PathFault(f"has no label ('{printable(fields[0])}'): write 'path label'")
            paths.append(clean_path(fields[0].lstrip()))
            labels.append(_label(fields[1], num_classes))
        except PathFault as fault:
            raise DatasetError(f"line {number} of {file} {fault}") from None
        lines.append(number)
    images = ImageList(file=file, paths=paths, labels_N=np.array(labels, np.int64), numbers_N=np.array(lines, np.int64))
    require_entries(images)
    return images


def clean_path(path: str) -> str:
    """`path` without `./` and doubled slashes.

    Raises:
        PathFault: the path is empty, absolute, leads upwards, or holds a backslash or what no file name can hold.
    """
    if not path or path.startswith("/") or "\\" in path or "\0" in path:
        raise PathFault(f"names '{printable(path)}', which is no path below a folder: write it relative, with '/'")
    if "./" in path or "//" in path or path.endswith(("/", ".")):
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts or not parts:
            raise PathFault(f"names '{printable(path)}', which leaves the folder of the images: fetch the list again")
        path = "/".join(parts)
    if not path.isprintable():
        try:
            os.fsencode(path)
        except UnicodeEncodeError:
            raise PathFault(f"names '{printable(path)}', which no file can be called: fetch the list again") from None
    return path


def require_label(label: int, num_classes: int) -> int:
    """`label` as it is; `PathFault` unless 0 ≤ label < num_classes."""
    if not 0 <= label < num_classes:
        raise PathFault(f"has label {label}, but labels run from 0 to {num_classes - 1}: fetch the list of this data set")
    return label


def _label(text: str, num_classes: int) -> int:
    digits = text[1:] if text.startswith("-") else text
    # Python's int takes 1_000 and other scripts' digits as well.
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise PathFault(f"has the label '{printable(text[:40])}', which is not an integer from 0 to {num_classes - 1}: write 'path label'")
    return require_label(int(text), num_classes)


def require_entries(images: ImageList) -> None:
    """Raises `DatasetError` where a list is empty or names an image twice."""
    if not images.paths:
        raise DatasetError(f"{images.file} lists no images: fetch it again")
    if len(set(images.paths)) < len(images.paths):
        first_row: dict[str, int] = {}
        for row, path in enumerate(images.paths):
            if first_row.setdefault(path, row) != row:
                before = f"{images.unit} {images.numbers_N[first_row[path]]}"
                raise DatasetError(f"{images.where(row)} names {printable(path)}, as {before} does: remove one of both")


def require_disjoint(lists: Mapping[str, ImageList]) -> tuple[str, ...]:
    """Sentences on images that val shares with train or test.

    Raises:
        DatasetError: train and test share images, so that the test would be worthless.
    """
    complaints = []
    for first, second in (("train", "test"), ("train", "val"), ("val", "test")):
        if first not in lists or second not in lists:
            continue
        shared = set(lists[first].paths).intersection(lists[second].paths)
        if shared:
            row = next(row for row, path in enumerate(lists[second].paths) if path in shared)
            path = lists[second].paths[row]
            both = f"{lists[first].where(lists[first].paths.index(path))} and {lists[second].where(row)}"
            sentence = f"{first} and {second} share {len(shared):,} of their images, the first is {printable(path)} ({both})"
            if (first, second) == ("train", "test"):
                raise DatasetError(f"{sentence}: fetch both lists again, a test on training images says nothing")
            complaints.append(sentence)
    return tuple(complaints)


def require_present(images: ImageList, missing: list[int], place: str) -> None:
    """Raises `DatasetError` where images of a list are missing in `place`: how many, and which is the first."""
    if missing:
        first = f"{printable(images.paths[missing[0]])} ({images.unit} {images.numbers_N[missing[0]]})"
        raise DatasetError(
            f"{place} lacks {len(missing):,} of the {len(images.paths):,} images of {images.file}, the first is {first}: "
            "add them, or name the right place with --source"
        )


def class_folders(lists: Iterable[ImageList], folder_of: Callable[[str], str]) -> tuple[dict[int, str], str | None]:
    """The folder that holds the images of each label.

    Args:
        lists: of one data set.
        folder_of: image path -> name of its class folder, "" where it has none.

    Returns:
        label -> folder, as first met; and a sentence on the first path that disagrees, or on two labels of one folder; None without.
    """
    found: dict[int, str] = {}
    seen_at: dict[int, str] = {}
    for images in lists:
        for row, (path, label) in enumerate(zip(images.paths, images.labels_N.tolist(), strict=True)):
            folder = folder_of(path)
            if not folder:
                continue
            if label not in found:
                found[label], seen_at[label] = folder, images.where(row)
            elif found[label] != folder:
                return found, f"{images.where(row)} gives label {label} to {folder}, but {seen_at[label]} gives it to {found[label]}"
    label_of: dict[str, int] = {}
    for label, folder in sorted(found.items()):
        if label_of.setdefault(folder, label) != label:
            return found, f"{seen_at[label_of[folder]]} and {seen_at[label]} give {folder} two labels, {label_of[folder]} and {label}"
    return found, None


def num_classes_of(lists: Mapping[str, ImageList]) -> int:
    """K: one more than the highest label of all lists."""
    return 1 + max(int(images.labels_N.max()) for images in lists.values())


def name_classes(found: Mapping[int, str], num_classes: int) -> tuple[str, ...]:
    """K names: what was found for a label, or the label itself; the label also stands behind a name that two classes share."""
    names = [printable(found.get(label, str(label))) for label in range(num_classes)]
    times = Counter(names)
    return tuple(name if times[name] == 1 else f"{name} ({label})" for label, name in enumerate(names))


def count_complaints(name: str, lists: Mapping[str, ImageList], class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Sentences on what the lists have more or less of than the published data set `name`."""
    entry = DATASETS[name]
    complaints = []
    for split, expected in entry.expected.items():
        found = len(lists[split].paths)
        if found != expected:
            amount = f"{expected - found:,} are missing; is the list cut short?" if found < expected else f"{found - expected:,} too many"
            complaints.append(f"{lists[split].file.name} lists {found:,} images, {expected:,} expected: {amount}")
    if entry.num_classes not in (None, len(class_names)):
        complaints.append(f"the lists of '{name}' name {len(class_names):,} classes, {entry.num_classes:,} expected")
    empty = np.flatnonzero(class_counts(lists["train"].labels_N, len(class_names)) == 0)
    if len(empty):
        complaints.append(
            f"{len(empty):,} of {len(class_names):,} classes have no image in {lists['train'].file.name}, "
            f"the first is label {empty[0]} ({class_names[empty[0]]})"
        )
    return tuple(complaints)
