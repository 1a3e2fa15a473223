"""The loss of a method as one module, for a training loop that is not this package's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bce3s.config import LossConfig
from bce3s.heads import FeatureMemory, NormalizedClassifier, Projector, build_classifier
from bce3s.losses.seam import Loss, LossInputs, MixedTargets
from pipelines.config import require
from pipelines.types import ConfigError, IntArray

# Odd, and far from the stride of the classes (class_subset.py): neighbouring steps then share no draws.
_KEY_STRIDE = 0x632BE59BD9B4E019


class StandaloneLoss(nn.Module):
    """A method's loss with what it trains and remembers: classifier, projector, feature memory and the method's own layers.

    Computes what the trainer computes, to the last bit: it is the same loss behind the same seam. `parameters()` belong in the optimizer
    beside the backbone's; the state dict holds memory and draws too. Predictions are `loss.classifier(features).argmax(1)`.

    Args:
        method: of `LOSSES`, such as `BCE3SLoss`.
        class_counts_K: training images of each class, whole numbers [K].
        feature_dim: D of the features it will be given.
        config: weights and settings of the method.
        projection_dim: P of projector and feature memory.
        num_epochs: of the run, which methods with a schedule ask for.
        bias_prior: see `ModelConfig`.

    Raises:
        ConfigError: sizes or counts that cannot be.
    """

    class_counts_K: Tensor
    draw_key: Tensor

    def __init__(
        self,
        method: type[Loss],
        class_counts_K: Sequence[int] | IntArray | Tensor,
        feature_dim: int,
        config: LossConfig | None = None,
        *,
        projection_dim: int = 128,
        num_epochs: int = 1,
        bias_prior: bool = False,
    ) -> None:
        super().__init__()
        given_K = torch.as_tensor(class_counts_K)
        counts_K = given_K.to(torch.int64)
        require(counts_K.ndim == 1 and len(counts_K) > 0, "class_counts holds the training images of each class, one number a class")
        # Shares of the classes, say, would all be cut to 0.
        whole = bool((counts_K == given_K).all()) and int(counts_K.min()) >= 0 and int(counts_K.max()) > 0
        require(whole, "class_counts holds whole numbers of images, none below 0 and not all 0")
        require(feature_dim >= 1 and projection_dim >= 1, f"feature_dim {feature_dim} and projection_dim {projection_dim} must be positive")
        num_classes = len(counts_K)
        self.method, self.config, self.num_epochs = method, config or LossConfig(), num_epochs
        self.classifier: NormalizedClassifier = build_classifier(method.classifier, feature_dim, num_classes, bias_prior=bias_prior)
        self.projector = Projector(feature_dim, projection_dim)
        self.feature_memory = FeatureMemory(num_classes, projection_dim)
        self.method_head: nn.Module = method.build_head(self.config, feature_dim, num_classes) or nn.Identity()
        self.register_buffer("class_counts_K", counts_K.clone(), persistent=False)
        # What a step draws is a function of this number alone; saved, so that a loop that is resumed draws what it would have drawn.
        self.register_buffer("draw_key", torch.randint(1 << 62, ()))
        self._loss: Loss | None = None
        self._loss_device: torch.device | None = None

    def forward(
        self,
        features_VD: Tensor,
        labels_B: Tensor,
        partner_labels_B: Tensor | None = None,
        lam: Tensor | float = 1.0,
        lam_cutmix: Tensor | float | None = None,
        epoch: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one step; in training mode the feature memory then takes the source view in, and the next step draws anew.

        Args:
            features_VD: [B, D] of images that nothing is mixed into: they stand for all three views, with targets of one class. With
                partners [3B, D], the views source, mixup and cutmix one after the other; of a method with views "pair" always [2B, D].
            labels_B: int64 [B], of the source view.
            partner_labels_B: int64 [B], of the images that are mixed in.
            lam: λ of the mixup view, the share of the source image, in [0, 1]; a tensor [] on the device saves a copy.
            lam_cutmix: λ of the cutmix view; None is `lam`.
            epoch: from 0, for methods that change over the epochs; None is the last: all terms, no warm-up of the memory.

        Returns:
            Total, float32 [], to be differentiated, and the detached terms, float32 [], before their weights.

        Raises:
            ConfigError: another number of features than labels ask for, or of another dimension.
        """
        views = 2 if self.method.views == "pair" else 3 if partner_labels_B is not None else 1
        if len(features_VD) != views * len(labels_B):
            raise ConfigError(_wrong_rows(len(features_VD), len(labels_B), views))
        feature_dim = self.classifier.in_features
        require(features_VD.shape[1:] == (feature_dim,), f"features are [., {feature_dim}] here, not {list(features_VD.shape)}")
        partners_B = labels_B if partner_labels_B is None else partner_labels_B
        if epoch is None:
            epoch = max(self.num_epochs - 1, self.config.contrastive_warmup_epochs)
        mixup = MixedTargets(labels_B, partners_B, _scalar(lam, features_VD))
        cutmix = mixup if lam_cutmix is None else MixedTargets(labels_B, partners_B, _scalar(lam_cutmix, features_VD))
        inputs = LossInputs(
            features_VD=features_VD.repeat(3, 1) if views == 1 else features_VD,
            mixup=mixup,
            cutmix=cutmix,
            heads=_Heads(self.classifier, self.projector, _MemoryBefore(self.feature_memory), self.method_head),
            epoch=epoch,
            num_epochs=self.num_epochs,
            progress=features_VD.new_full((), epoch / self.num_epochs, dtype=torch.float32),
            batch_labels_G=labels_B,
            draw_key=self.draw_key.clone(),
        )
        total, terms, projections_BP = self._loss_on(features_VD.device)(inputs)
        if self.training:
            self.draw_key += _KEY_STRIDE
            if projections_BP is not None:
                self.feature_memory.update(projections_BP, labels_B)
        return total, terms

    def _loss_on(self, device: torch.device) -> Loss:
        """A loss keeps its constants on one device, and a module is moved after it is made."""
        if self._loss is None or self._loss_device != device:
            self._loss, self._loss_device = self.method(self.config, self.class_counts_K.to(device)), device
        return self._loss


class _MemoryBefore:
    """The memory as this step found it: the loss may save `filled_K` for its backward pass, and the memory is written before that."""

    def __init__(self, memory: FeatureMemory) -> None:
        self.filled_K, self._memory = memory.filled_K.clone(), memory

    def normalized(self) -> Tensor:
        return self._memory.normalized()


@dataclass(frozen=True)
class _Heads:
    classifier: NormalizedClassifier
    projector: Projector
    feature_memory: _MemoryBefore
    method_head: nn.Module


def _scalar(lam: Tensor | float, features_VD: Tensor) -> Tensor:
    return lam if isinstance(lam, Tensor) else features_VD.new_full((), lam, dtype=torch.float32)


def _wrong_rows(num_features: int, num_labels: int, views: int) -> str:
    what = {1: "one feature row a label", 2: "two augmentations of each image", 3: "three views of each image"}[views]
    return f"{num_features} rows of features do not go with {num_labels} labels: called so, the loss takes {what}"
