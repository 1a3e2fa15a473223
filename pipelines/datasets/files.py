"""Splits made of image files: paths and labels in, bytes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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

    def read(position: int) -> EncodedSample:
        path = Path(paths[position])
        try:
            encoded = path.read_bytes()
        except OSError as error:
            raise DatasetError(f"cannot read {path} ({error.strerror}): restore the file and run the command again") from error
        extension = path.suffix[1:].lower().replace("jpeg", "jpg")
        return EncodedSample(encoded=encoded, extension=extension, label=int(labels_N[position]), source=str(path))

    return Split(labels_N=labels_N.astype(np.int64), sources=paths, read=read)
