"""Splits of the images that lists name, once all of them were found: in a tree of files or in a tar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.datasets.archives import index_tar
from pipelines.datasets.files import file_split, missing_files, printable
from pipelines.datasets.lists import ImageList, require_present
from pipelines.types import Split


def tree_splits(folder: Path, lists: Mapping[str, ImageList], paths: Mapping[str, Sequence[str]]) -> dict[str, Split]:
    """Splits of image files.

    Args:
        folder: what to call the tree in messages.
        lists: split -> its list.
        paths: split -> the file of each entry; "" where there is none.

    Raises:
        DatasetError: a file is not there, or a folder cannot be listed.
    """
    for split, images in lists.items():
        require_present(images, missing_files(paths[split]), printable(str(folder)))
    return {split: file_split(paths[split], images.labels_N) for split, images in lists.items()}


def tar_splits(archive: Path, lists: Mapping[str, ImageList], members: Mapping[str, Sequence[str]]) -> dict[str, Split]:
    """Splits of members of an uncompressed tar.

    Args:
        archive: the tar, which may hold class tars; see `index_tar`.
        lists: split -> its list.
        members: split -> the member name of each entry.

    Raises:
        DatasetError: the archive is damaged or lacks a member.
    """
    rows = {name: row for row, name in enumerate(dict.fromkeys(name for split in lists for name in members[split]))}
    found = index_tar(archive, list(rows))
    splits = {}
    for split, images in lists.items():
        rows_N = np.array([rows[name] for name in members[split]], np.int64)
        missing = [int(row) for row in np.flatnonzero(found.offsets_N[rows_N] < 0)]
        require_present(images, missing, printable(str(archive)))
        splits[split] = found.split(rows_N, images.labels_N)
    return splits
