"""What the steps of stage two are fed with: features and labels, kept ones or those of a backbone that still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from bce3s.device import Placement
from bce3s.models import Recogniser
from bce3s.throughput.waits import DataWaits
from pipelines.augment.mix import channel_statistics, normalise
from pipelines.augment.pixel_ops import upload
from pipelines.config import AugmentConfig
from pipelines.order import SampleOrder
from pipelines.types import Batch, Loader


class Feed(Protocol):
    """One way to get the batches.

    Attributes:
        num_steps: of an epoch.
    """

    num_steps: int

    @property
    def data_wait_share(self) -> float:
        """Of the last epoch's time, 0…1, what the device waited for data."""
        ...

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features float32 [B, D] without gradients, and labels int64 [B], of every step; `epoch` counts from 0 within stage two."""
        ...


class KeptFeatures:
    """Batch-norm frozen: steps on features that are there. Epoch e takes augmentation e mod A."""

    data_wait_share = 0.0

    def __init__(self, features_AND: Tensor, order: SampleOrder, labels_N: Tensor, first_epoch: int, *, is_balanced: bool) -> None:
        """Copies nothing.

        Args:
            features_AND: [A, N, D] by augmentation and image.
            order: of the training split; its partner stream is the class-balanced draw.
            labels_N: int64 [N], on the device of the features.
            first_epoch: of the order, as `RunningBackbone` has it.
            is_balanced: draw images class-balanced with replacement instead of each once an epoch.
        """
        self._features_AND, self._order, self._labels_N = features_AND, order, labels_N
        self._first_epoch, self._is_balanced = first_epoch, is_balanced
        self.num_steps = order.num_steps

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Feed`."""
        place = self._first_epoch + epoch
        ids_N = self._order.partner_epoch(place) if self._is_balanced else self._order.instance_epoch(place)
        features_ND = self._features_AND[epoch % len(self._features_AND)]
        # One copy to the device an epoch; its parts are the steps'.
        for ids_B in upload(ids_N, self._labels_N.device).split(self._order.batch_size):
            yield features_ND[ids_B].float(), self._labels_N[ids_B]


class RunningBackbone:
    """Batch-norm updated, the reference's way: every epoch goes through the backbone in training mode, whose weights take no gradient.

    Batch-norm uses the batch's statistics and its running ones drift towards the augmented data (traps.md A4).
    """

    def __init__(
        self,
        model: Recogniser,
        loader: Loader,
        augment: AugmentConfig,
        placement: Placement,
        first_epoch: int,
        check: Callable[[], None],
        *,
        is_balanced: bool,
    ) -> None:
        """Draws nothing yet.

        Args:
            model: its backbone is run.
            loader: of "train"; where `is_balanced`, its partner stream is the class-balanced draw.
            augment: mean and std.
            placement: device, precision and memory layout.
            first_epoch: of the loader.
            check: called before each batch; may raise to stop.
            is_balanced: take the partner stream instead of the instance stream. The other one is decoded for nothing.
        """
        self._model, self._loader, self._placement, self._check = model, loader, placement, check
        self._mean, self._std = channel_statistics(augment, placement.device)
        self._first_epoch, self._is_balanced = first_epoch, is_balanced
        self.num_steps, self._waits = loader.num_steps, DataWaits[Batch](iter(()), placement.device)

    @property
    def data_wait_share(self) -> float:
        """See `Feed`; to be asked for once the host has waited for the epoch's loss."""
        return self._waits.total().data_wait_share

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Feed`."""
        self._model.train()
        self._waits = DataWaits(self._loader.epoch(self._first_epoch + epoch), self._placement.device)
        for batch in self._waits:
            self._check()
            images_BHWC, labels_B = (both.chunk(2)[self._is_balanced] for both in (batch.images_SHWC, batch.labels_S))
            yield self._features(images_BHWC), labels_B

    @torch.no_grad()
    def _features(self, images_BHWC: Tensor) -> Tensor:
        views = normalise(images_BHWC, self._mean, self._std, self._placement.dtype)
        with self._placement.autocast():
            features_BD = self._model.features(views if self._placement.channels_last else views.contiguous())
        return features_BD.float()
