"""Evaluation of a split: every image once, no randomness, one wait for the device at the end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bce3s.device import Placement
from bce3s.distributed import ALONE, World
from bce3s.losses.terms import prior_shift
from bce3s.metrics import Accuracy, FeatureStatistics, ReliabilityBins, accuracy_from_counts
from bce3s.models import LinearClassifier, NormalizedClassifier, Recogniser
from pipelines.augment.mix import channel_statistics, normalise
from pipelines.config import AugmentConfig
from pipelines.types import IntArray, Loader


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    train_counts_K: IntArray,
    augment: AugmentConfig,
    placement: Placement,
    *,
    flip_tta: bool = False,
    on_step: Callable[[], None] = lambda: None,
    world: World = ALONE,
    confidence: str = "softmax",
    adjust_logits: float = 0.0,
    features: FeatureStatistics | None = None,
    on_predictions: Callable[[IntArray, Tensor], None] | None = None,
) -> dict[str, Accuracy]:
    """Top-1 accuracies and calibration of one pass over a split.

    Returns:
        "plain"; with `flip_tta` also "flip_tta" (mean of the logits with those of the mirrored image); with `adjust_logits` also the
        same rows adjusted, "plain_adjusted" and "flip_tta_adjusted".

    Args:
        model: images [B, 3, H, W] to logits [B, K]; put into evaluation mode here and left as it was found.
        loader: of "val" or "test", or of "train" without augmentation.
        train_counts_K: int64 [K], training images a class, for the shot groups and the prior of `adjust_logits`.
        augment: mean and std.
        placement: device, and the precision of the backbone: a `Recogniser`'s classifier computes in float32.
        flip_tta: also evaluate with flip test-time augmentation (traps.md A2: never the headline).
        on_step: called after each batch.
        world: whose ranks hold equal models and evaluate their shares of the split; counts are summed, so the accuracies are exact.
        confidence: of a prediction: "softmax" or "sigmoid" (`bce3s.metrics.confidence_kind`).
        adjust_logits: τ of post-hoc logit adjustment (Menon et al. 2021, eq. 9); 0 is off.
        features: also collects the plain images' features, of all ranks; `model` is then a `Recogniser`.
        on_predictions: given each batch's `ids_S` and, on the device, the labels int64 [S] predicted for its plain images.
    """
    was_training = model.training
    model.eval()
    mean, std = channel_statistics(augment, placement.device)
    names = ("plain", "flip_tta") if flip_tta else ("plain",)
    rows = {name: _Row(len(train_counts_K), placement.device, confidence) for name in names}
    shift_K = prior_shift(torch.from_numpy(train_counts_K), adjust_logits).to(placement.device) if adjust_logits else None
    if shift_K is not None:
        rows |= {f"{name}_adjusted": _Row(len(train_counts_K), placement.device, confidence) for name in names}
    total_K = torch.zeros(len(train_counts_K), dtype=torch.int64, device=placement.device)
    for batch in loader.epoch(0):
        images = normalise(batch.images_SHWC, mean, std, placement.dtype)
        logits = {"plain": _logits(model, images, placement, batch.labels_S, features)}
        if flip_tta:
            # Halved: a confidence is of one image's logits, not of a sum.
            logits["flip_tta"] = (logits["plain"] + _logits(model, images.flip(3), placement, batch.labels_S, None)) / 2
        # bincount would ask the device for the largest label and wait for the answer.
        total_K.scatter_add_(0, batch.labels_S, torch.ones_like(batch.labels_S))
        for name, logits_BK in logits.items():
            rows[name].add(logits_BK, batch.labels_S)
            if shift_K is not None:
                rows[f"{name}_adjusted"].add(logits_BK - shift_K, batch.labels_S)
        if on_predictions is not None:
            on_predictions(batch.ids_S, logits["plain"].argmax(1))
        on_step()
    model.train(was_training)
    if features is not None:
        features.sum_over(world)
    totals_K = world.sum(total_K).cpu().numpy()
    return {name: row.accuracy(world, totals_K, train_counts_K) for name, row in rows.items()}


def classifier_rows(classifier: NormalizedClassifier) -> Tensor:
    """The classifier's rows [K, D] as they meet the features: at length 1 where it normalises them."""
    rows_KD = classifier.weight if isinstance(classifier, LinearClassifier) else classifier.normalized_weight()
    return rows_KD.detach()


class _Row:
    """One way to predict: its right answers by class, and its confidences."""

    def __init__(self, num_classes: int, device: torch.device, confidence: str) -> None:
        self._correct_K = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._reliability = ReliabilityBins(device, confidence)

    def add(self, logits_BK: Tensor, labels_B: Tensor) -> None:
        right_B = (logits_BK.argmax(1) == labels_B).to(torch.int64)
        self._correct_K.scatter_add_(0, labels_B, right_B)
        self._reliability.add(logits_BK, right_B)

    def accuracy(self, world: World, totals_K: IntArray, train_counts_K: IntArray) -> Accuracy:
        self._reliability.sum_over(world)
        correct_K = world.sum(self._correct_K).cpu().numpy()
        return accuracy_from_counts(correct_K, totals_K, train_counts_K, self._reliability.result())


def _logits(model: nn.Module, images: Tensor, placement: Placement, labels_B: Tensor, features: FeatureStatistics | None) -> Tensor:
    """Float32 logits [B, K]; the features on the way to them are added to `features`."""
    if not isinstance(model, Recogniser):
        assert features is None, "only a recogniser shows its features"
        with placement.autocast():
            logits_BK: Tensor = model(images)
        return logits_BK.float()
    features_BD, logits_BK = features_and_logits(model, images, placement)
    if features is not None:
        features.add(features_BD, labels_B)
    return logits_BK


def features_and_logits(model: Recogniser, images: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    """Normalised images [B, 3, H, W] to features [B, D] and logits [B, K], both float32, as every measurement and prediction has them.

    The backbone alone runs in the placement's precision. Logits rounded to bfloat16, with 8 bits, tie, and of equal logits the arg max
    takes the first class: where classes are sorted by size, the larger one.
    """
    with placement.autocast():
        features_BD = model.features(images).float()
    return features_BD, model.classifier(features_BD)
