"""The most likely classes of image files, batch by batch, in order, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bce3s.evaluate import features_and_logits
from bce3s.losses.terms import prior_shift
from bce3s.metrics import confidence_kind
from bce3s.train import TrainedNetwork, retrained_with
from pipelines.augment.mix import channel_statistics, normalise
from pipelines.loaders.loose import LooseLoader
from pipelines.types import BackendError


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says of one image.

    Args:
        path: of the file, as it was named.
        labels: of the classes, the most likely first.
        probabilities: of each of them, in [0, 1]; softmaxes sum to 1 over all classes, sigmoids are each class's own.
    """

    path: str
    labels: tuple[int, ...]
    probabilities: tuple[float, ...]


class Predictor:
    """Names the classes of image files with the pixels, the network and the precision of `bce3s evaluate`.

    Attributes:
        confidence: what a probability is: "softmax" or "sigmoid".
        num_predicted: images so far.
        num_damaged: files so far that were no readable images.
    """

    def __init__(
        self,
        network: TrainedNetwork,
        *,
        top: int = 5,
        adjust_logits: float = 0.0,
        batch_size: int | None = None,
        validate: bool = True,
    ) -> None:
        """Builds the loader; nothing is read yet.

        Args:
            network: of `open_network`.
            top: classes a prediction names; all where there are fewer.
            adjust_logits: τ of post-hoc logit adjustment (Menon et al. 2021, eq. 9); 0 is off.
            batch_size: images that go through the network together; the run's by default, which gives evaluation's logits to the bit.
            validate: look at every byte of an image first, as make_shards.py does.
        """
        data = replace(network.config.data, num_threads=0, batch_size=batch_size or network.config.data.batch_size)
        placement = network.placement
        self._network, self._top = network, min(top, len(network.class_names))
        self._loader = LooseLoader(data, placement.device, validate=validate)
        self._mean, self._std = channel_statistics(data.augment, placement.device)
        shift_K = prior_shift(torch.from_numpy(network.class_counts_K), adjust_logits) if adjust_logits else None
        self._shift_K = None if shift_K is None else shift_K.to(placement.device)
        self.confidence = confidence_of(network)
        self.num_predicted = 0

    @property
    def num_damaged(self) -> int:
        """Files that were left out."""
        return self._loader.num_damaged

    def predict(self, paths: Iterable[str], on_damage: Callable[[str], None]) -> Iterator[Prediction]:
        """Yields a prediction for each readable image, in the order of `paths`.

        Args:
            paths: of image files, taken as they are needed.
            on_damage: told one sentence about each file that is no readable image; the others go on.

        Raises:
            BackendError: DALI is missing or fails, or the network's outputs are not numbers.
        """
        waiting: tuple[list[str], Tensor, Tensor] | None = None
        for names, images_SHWC in self._loader.batches(paths, on_damage):
            ready, waiting = waiting, (names, *self._most_likely(images_SHWC))
            # One batch later, so that a GPU computes while this one's answers are written.
            if ready is not None:
                yield from self._predictions(*ready)
        if waiting is not None:
            yield from self._predictions(*waiting)

    def logits(self, images_SHWC: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] on the network's device → float32 [B, K], adjusted where asked; the classifier computes in float32."""
        model, placement = self._network.model, self._network.placement
        with torch.inference_mode():
            images = normalise(images_SHWC, self._mean, self._std, placement.dtype)
            _, logits_BK = features_and_logits(model, images, placement)
            return logits_BK if self._shift_K is None else logits_BK - self._shift_K

    def _most_likely(self, images_SHWC: Tensor) -> tuple[Tensor, Tensor]:
        logits_BK = self.logits(images_SHWC)
        with torch.inference_mode():
            # By logits: sigmoids of large ones are all 1. Stable: of equal ones the first class wins, as in evaluation.
            ordered_BK, labels_BK = logits_BK.sort(dim=1, descending=True, stable=True)
            top_BT = ordered_BK[:, : self._top]
            if self.confidence == "softmax":
                top_BT = (top_BT - logits_BK.logsumexp(1, keepdim=True)).exp()
            else:
                top_BT = top_BT.sigmoid()
            return labels_BK[:, : self._top], top_BT

    def _predictions(self, names: list[str], labels_BT: Tensor, probabilities_BT: Tensor) -> Iterator[Prediction]:
        if not bool(probabilities_BT.isfinite().all()):
            raise BackendError(f"the outputs of {self._network.path} are not finite numbers; predict with another checkpoint")
        for name, labels, probabilities in zip(names, labels_BT.tolist(), probabilities_BT.tolist(), strict=True):
            self.num_predicted += 1
            yield Prediction(path=name, labels=tuple(labels), probabilities=tuple(probabilities))

    def close(self) -> None:
        """Frees the loader's threads and buffers."""
        self._loader.close()


def confidence_of(network: TrainedNetwork) -> str:
    """What a probability of this network is: "softmax" or "sigmoid" (`bce3s.metrics.confidence_kind`).

    Whether a stage two trained its classifier anew is known from the run's folder; of a file outside of one it is not.
    """
    return confidence_kind(network.config.loss, retrained_with(network.state, network.run))
