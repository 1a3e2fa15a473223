"""Features of a frozen backbone: computed once through the run's own loaders, kept on the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bce3s.device import Placement
from bce3s.metrics import Accuracy, accuracy_from_counts
from bce3s.models import NormalizedClassifier, Recogniser
from pipelines.augment.mix import channel_statistics, normalise
from pipelines.augment.pixel_ops import upload
from pipelines.config import AugmentConfig
from pipelines.loaders.choice import free_bytes
from pipelines.loaders.planned import stand_ins
from pipelines.types import ConfigError, IntArray, Loader, ShardError

AUGMENTED_PER_PASS = 2  # with data.order.partner "same" a batch holds each image twice
SHARE_OF_FREE_MEMORY = 0.5
_ROWS_AT_ONCE = 4096  # of logits in `accuracy_on`: [4096, 8142] in float32 are 133 MB


class FrozenBackbone:
    """A backbone in evaluation mode without gradients: pixels to features, nothing of it changes.

    Args:
        model: put into evaluation mode here.
        augment: mean and std.
        placement: device, precision and memory layout of the run.
    """

    def __init__(self, model: Recogniser, augment: AugmentConfig, placement: Placement) -> None:
        self._model = model.eval()
        self._mean, self._std = channel_statistics(augment, placement.device)
        self._placement = placement

    @torch.no_grad()
    def __call__(self, images_SHWC: Tensor) -> Tensor:
        """Pixels uint8 [S, H, W, 3] to features [S, D] in the run's precision."""
        views = normalise(images_SHWC, self._mean, self._std, self._placement.dtype)
        with self._placement.autocast():
            return self._model.features(views if self._placement.channels_last else views.contiguous())


def affordable_epochs(asked: int, num_images: int, feature_dim: int, placement: Placement) -> int:
    """How many augmented epochs of features fit in half of the free memory: `asked`, or fewer.

    Raises:
        ConfigError: not even one fits; says how much it needs and what does without.
    """
    epoch_bytes = num_images * feature_dim * placement.dtype.itemsize
    room = free_bytes(placement.device) * SHARE_OF_FREE_MEMORY
    if epoch_bytes > room:
        raise ConfigError(
            f"the features of {num_images:,} images take {epoch_bytes / 2**30:.1f} GiB, more than half of what is free on "
            f"{placement.device}; take --batch-norm updated, which keeps none"
        )
    return min(asked, int(room // epoch_bytes))


def training_features(
    backbone: FrozenBackbone, loader: Loader, labels_N: IntArray, first_epoch: int, num_augmented: int, on_step: Callable[[], None]
) -> Tensor:
    """Features [A, N, D] of `num_augmented` augmentations of every training image, by its place in the split; on the device.

    Two augmentations come from each pass: the loader's partner stream must hold the instance stream's images (`partner="same"`).

    Args:
        backbone: gives them.
        loader: of "train", on one rank.
        labels_N: int64 [N], for images that cannot be read any more: another of the class stands in, as the loader's `on_error` decides.
        first_epoch: of the loader; its augmentation is that of no earlier epoch.
        num_augmented: A.
        on_step: called after each batch.

    Raises:
        ShardError: no image of some class can be read.
    """
    num_images, features_AND = len(labels_N), None
    seen_N = np.zeros(num_images, bool)
    for number in range(math.ceil(num_augmented / AUGMENTED_PER_PASS)):
        first = number * AUGMENTED_PER_PASS
        streams = min(AUGMENTED_PER_PASS, num_augmented - first)
        for batch in loader.epoch(first_epoch + number):
            used = streams * batch.num_sources  # the last pass of an odd number leaves the partner stream
            features_SD = backbone(batch.images_SHWC[:used])
            if features_AND is None:
                features_AND = features_SD.new_zeros(num_augmented, num_images, features_SD.shape[1])
            ids_S = upload(batch.ids_S[:used], features_SD.device)
            for stream, (ids_B, rows_BD) in enumerate(zip(ids_S.chunk(streams), features_SD.chunk(streams), strict=True)):
                features_AND[first + stream].index_copy_(0, ids_B, rows_BD)
            seen_N[batch.ids_S[: batch.num_sources]] = True
            on_step()
    assert features_AND is not None, "a loader of an empty split cannot be opened"
    return features_AND if seen_N.all() else _completed(features_AND, labels_N, seen_N)


def _completed(features_AND: Tensor, labels_N: IntArray, seen_N: np.ndarray) -> Tensor:
    """Rows of images that the loader skipped are those of others of their class."""
    stand_ins_N = stand_ins(labels_N, ~seen_N, seen_N)
    lost = np.unique(labels_N[stand_ins_N < 0])
    if len(lost):
        raise ShardError(f"no training image of class {lost[0]} can be read any more; mend the shards with tools/verify_shards.py")
    return features_AND[:, upload(stand_ins_N, features_AND.device)]


def evaluation_features(backbone: FrozenBackbone, loader: Loader, on_step: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels int64 [N] of an evaluation split, in its loader's order."""
    features, labels = [], []
    for batch in loader.epoch(0):
        features.append(backbone(batch.images_SHWC))
        labels.append(batch.labels_S)
        on_step()
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def accuracy_on(
    features_ND: Tensor, labels_N: Tensor, classifier: NormalizedClassifier, train_counts_K: IntArray, placement: Placement
) -> Accuracy:
    """Top-1 accuracies of `classifier` on kept features, in the precision that `evaluate` has; waits for the device once."""
    num_classes = len(train_counts_K)
    total_K, correct_K = (torch.zeros(num_classes, dtype=torch.int64, device=labels_N.device) for _ in range(2))
    total_K.scatter_add_(0, labels_N, torch.ones_like(labels_N))
    for rows_BD, labels_B in zip(features_ND.split(_ROWS_AT_ONCE), labels_N.split(_ROWS_AT_ONCE), strict=True):
        with placement.autocast():
            right_B = classifier(rows_BD).argmax(1) == labels_B
        correct_K.scatter_add_(0, labels_B, right_B.to(torch.int64))
    return accuracy_from_counts(correct_K.cpu().numpy(), total_K.cpu().numpy(), train_counts_K)
