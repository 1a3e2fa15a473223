"""Splits made of image files: paths and labels in, bytes out."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import numpy as np

from pipelines.types import DatasetError, EncodedSample, IntArray, Split

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def file_split(paths: Sequence[str], labels_N: IntArray) -> Split:
    """A split that reads whole files when asked.

    Args:
        paths: N image files; nothing is opened before `read`.
        labels_N: int64 [N].

    Returns:
        A split whose `read(i)` gives the bytes of `paths[i]` as they are, with the lower-case suffix as extension (jpeg becomes jpg).
        It raises `DatasetError` naming the file where it is gone or cannot be read.
    """
    sources = [printable(path) for path in paths]

    def read(position: int) -> EncodedSample:
        try:
            with open(paths[position], "rb", buffering=0) as file:  # a Path would cost half as much again as reading a photograph
                encoded = file.read()
        except OSError as error:
            raise DatasetError(f"cannot read {sources[position]} ({error.strerror}): restore the file and run the command again") from error
        extension = image_extension(paths[position])
        return EncodedSample(encoded=encoded, extension=extension, label=int(labels_N[position]), source=sources[position])

    return Split(labels_N=labels_N.astype(np.int64), sources=sources, read=read)


def image_extension(name: str) -> str:
    """The lower-case suffix of a file name without its dot; jpeg becomes jpg."""
    return os.path.splitext(name)[1][1:].lower().replace("jpeg", "jpg")


def printable(text: str) -> str:
    r"""`text` for messages: what cannot be printed, such as stand-ins for bytes that are not UTF-8, is escaped (`\udcff`)."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text)


def list_files(folder: str) -> set[str]:
    """Names of the files in `folder`, also those behind links; empty where there is no such folder.

    Raises:
        DatasetError: the folder cannot be listed, or links run in a circle.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if _is_file(entry)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise DatasetError(f"cannot list {printable(folder)} ({error.strerror}): make it readable and run the command again") from error


def missing_files(paths: Sequence[str]) -> list[int]:
    """Positions of `paths`, rising, where there is no file.

    Every folder is listed once: a stat a file takes minutes on a network disk.

    Raises:
        DatasetError: a folder cannot be listed, or links run in a circle.
    """
    positions_of: dict[str, list[int]] = {}
    for position, path in enumerate(paths):
        positions_of.setdefault(os.path.dirname(path), []).append(position)
    missing = []
    for folder, positions in positions_of.items():
        present = list_files(folder)
        missing += [position for position in positions if os.path.basename(paths[position]) not in present]
    return sorted(missing)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()  # asks the disk only for links
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DatasetError(f"the links at {printable(entry.path)} run in a circle: remove or mend them") from error
        return False
