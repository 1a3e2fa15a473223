"""Which classes are taken for which: counted over a split, and shown with its own images."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bce3s.report.findings import ConfusedPair, Thumbnail
from pipelines.types import IntArray, ShardError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.format import ShardSet, ShardSplit

MAX_PAIRS = 12
MAX_MISTAKEN = 3
THUMBNAIL_PX = 96
_QUALITY = 85


class Predictions:
    """What a pass over a split predicts; stays on the device until it is asked for."""

    def __init__(self) -> None:
        """None yet."""
        self._ids: list[IntArray] = []
        self._predicted: list[Tensor] = []

    def add(self, ids_S: IntArray, predicted_S: Tensor) -> None:
        """One batch: positions in the split's index, and int64 [S] labels on the device."""
        self._ids.append(ids_S.copy())
        self._predicted.append(predicted_S)

    def collected(self) -> tuple[IntArray, IntArray]:
        """Ids and predicted labels, int64 [N] each, in the split's order; waits for the device."""
        if not self._ids:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        import torch

        ids_N = np.concatenate(self._ids)
        order_N = np.argsort(ids_N, kind="stable")
        return ids_N[order_N], torch.cat(self._predicted).cpu().numpy()[order_N]


class Confusion(NamedTuple):
    """Images of `true_class` that were predicted as `predicted_class`: their number, share of the class, and ids in the split's order."""

    true_class: int
    predicted_class: int
    num_images: int
    share: float
    ids: IntArray


def most_confused(labels_N: IntArray, predicted_N: IntArray, ids_N: IntArray, num_classes: int, most: int = MAX_PAIRS) -> list[Confusion]:
    """The most frequent mistakes: by number of images, then by share of the true class, then by label.

    Args:
        labels_N, predicted_N, ids_N: int64 [N].
        num_classes: K; only pairs that occur take room, never K².
        most: at most so many.
    """
    wrong = np.flatnonzero(labels_N != predicted_N)
    pairs, counts = np.unique(labels_N[wrong] * num_classes + predicted_N[wrong], return_counts=True)
    true, predicted = pairs // num_classes, pairs % num_classes
    shares = counts / np.bincount(labels_N, minlength=num_classes)[true]
    chosen = np.lexsort((pairs, -shares, -counts))[:most]
    return [
        Confusion(
            *(int(true[i]), int(predicted[i]), int(counts[i]), float(shares[i])),
            ids_N[(labels_N == true[i]) & (predicted_N == predicted[i])],
        )
        for i in chosen.tolist()
    ]


def picture_pairs(confusions: list[Confusion], shards: ShardSet, split: str) -> tuple[tuple[ConfusedPair, ...], list[str]]:
    """The same with small pictures, read from the shards, here or at a URL.

    Returns:
        The pairs, and sentences on what could not be read; what was then has no pictures.
    """
    album = _Album(shards)
    names = shards.class_names
    pairs = []
    for each in confusions:
        true, predicted = names[each.true_class], names[each.predicted_class]
        alt = f"an image of {true} that was taken for {predicted}"
        mistaken = [album.thumbnail(split, sample_id, alt) for sample_id in each.ids[:MAX_MISTAKEN].tolist()]
        pairs.append(
            ConfusedPair(
                true_class=each.true_class,
                predicted_class=each.predicted_class,
                count=each.num_images,
                share=each.share,
                mistaken=tuple(found for found in mistaken if found),
                example=album.first_of_class(each.predicted_class, f"a training image of {predicted}"),
            )
        )
    return tuple(pairs), list(album.complaints.values())


class _Album:
    """Small pictures of single images of a shard set."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._splits: dict[str, ShardSplit | None] = {}
        self.complaints: dict[str, str] = {}  # split -> the first thing that went wrong there

    def thumbnail(self, split: str, sample_id: int, alt: str) -> Thumbnail | None:
        opened = self._open(split)
        if opened is None:
            return None
        try:
            return thumbnail_of(encoded_image(self._shards, opened, sample_id), alt)
        except (UserError, OSError) as error:
            self.complaints.setdefault(split, f"Some pictures of the {split} split are left out: {error}.")
            return None

    def first_of_class(self, label: int, alt: str) -> Thumbnail | None:
        """Of the train split; None where the class has no image there."""
        opened = self._open("train")
        if opened is None:
            return None
        found = np.flatnonzero(opened.labels_N == label)
        return self.thumbnail("train", int(found[0]), alt) if len(found) else None

    def _open(self, split: str) -> ShardSplit | None:
        if split not in self._splits:
            try:
                self._splits[split] = self._shards.split(split)
            except (UserError, OSError) as error:
                self._splits[split] = None
                self.complaints[split] = f"Pictures of the {split} split are left out: {error}."
        return self._splits[split]


def encoded_image(shards: ShardSet, split: ShardSplit, sample_id: int) -> bytes:
    """The encoded bytes of one image.

    Raises:
        ShardError: its shard is not there, or not as long as it was.
        OSError: a server does not answer.
    """
    from pipelines.format.origin import Ending

    shard = int(split.shards_N[sample_id])
    file, shard_bytes = split.entry["shards"][shard]["file"], int(split.shard_bytes[shard])
    target = np.empty(int(split.sizes_N[sample_id]), np.uint8)
    # Through the origin also where the shard is mapped: a file that was cut short is then an error, not the end of the process.
    done = sum(shards.origin.read(file, int(split.offsets_N[sample_id]), target, shard_bytes, Ending()))
    if done < len(target):
        raise ShardError(f"{shards.origin.url(file)} ended early")
    return target.tobytes()


def thumbnail_of(encoded: bytes, alt: str) -> Thumbnail:
    """The image as a JPEG whose longer side is at most 96 px; a smaller image keeps its size.

    Raises:
        ShardError: it does not decode.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.draft("RGB", (2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))  # a JPEG is decoded no larger than it has to be
            small = image.convert("RGB")
        small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=_QUALITY)
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and more
        raise ShardError(f"an image does not decode ({str(error) or type(error).__name__})") from error
    return Thumbnail(jpeg=buffer.getvalue(), width_px=small.width, height_px=small.height, alt=alt)
