"""Evaluation of a split: every image once, no randomness, one wait for the device at the end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bce3s.device import Placement
from bce3s.distributed import ALONE, World
from bce3s.metrics import Accuracy, accuracy_from_counts
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
) -> dict[str, Accuracy]:
    """Top-1 accuracies under "plain" and, if asked for, under "flip_tta" (logits averaged with those of the mirrored image).

    Args:
        model: images [B, 3, H, W] to logits [B, K]; put into evaluation mode here and left as it was found.
        loader: of "val" or "test".
        train_counts_K: int64 [K], training images a class, for the shot groups.
        augment: mean and std.
        placement: precision and device.
        flip_tta: also evaluate with flip test-time augmentation (traps.md A2: never the headline).
        on_step: called after each batch.
        world: whose ranks hold equal models and evaluate their shares of the split; counts are summed, so the accuracies are exact.
    """
    was_training = model.training
    model.eval()
    mean, std = channel_statistics(augment, placement.device)
    num_classes = len(train_counts_K)
    names = ("plain", "flip_tta") if flip_tta else ("plain",)
    correct = {name: torch.zeros(num_classes, dtype=torch.int64, device=placement.device) for name in names}
    total_K = torch.zeros(num_classes, dtype=torch.int64, device=placement.device)
    for batch in loader.epoch(0):
        images = normalise(batch.images_SHWC, mean, std, placement.dtype)
        with placement.autocast():
            logits = {"plain": model(images).float()}
            if flip_tta:
                logits["flip_tta"] = logits["plain"] + model(images.flip(3)).float()
        # bincount would ask the device for the largest label and wait for the answer.
        total_K.scatter_add_(0, batch.labels_S, torch.ones_like(batch.labels_S))
        for name, logits_BK in logits.items():
            right_B = (logits_BK.argmax(1) == batch.labels_S).to(torch.int64)
            correct[name].scatter_add_(0, batch.labels_S, right_B)
        on_step()
    model.train(was_training)
    for counts_K in (total_K, *correct.values()):
        world.sum(counts_K)
    totals_K = total_K.cpu().numpy()
    return {name: accuracy_from_counts(counts_K.cpu().numpy(), totals_K, train_counts_K) for name, counts_K in correct.items()}
