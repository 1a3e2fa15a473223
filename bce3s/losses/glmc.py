"""GLMC: consistency of a mixup and a cutmix view of one pair, and a loss that moves from plain to reweighted mixed labels.

Source: Du et al., CVPR 2023, "Global and Local Mixture Consistency Cumulative Learning for Long-tailed Visual Recognitions"; where the
paper is silent, the authors' code (ynu-yangpeng/GLMC, `Trainer.py` and `model/`). What differs from that code:

- One augmentation of each image, which both mixed views share; there each view has one of its own.
- Batch-norm sees the three views of this loop together; there it sees each mixed view alone. The source view has no term.
- The layers start as torch's own; there, on CIFAR, from a normal distribution (He et al. 2015).
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bce3s.config import LossConfig
from bce3s.losses.ce import mixed_ce
from bce3s.losses.seam import LossDefaults, LossInputs, LossOutput
from bce3s.losses.terms import mixed_views, widened


class HeadOutput(NamedTuple):
    """What `GLMCHead` makes of features: logits [V, K], projections [V, P] and predictions of the other view's projections [V, P]."""

    logits_VK: Tensor
    projections_VP: Tensor
    predictions_VP: Tensor


class GLMCHead(nn.Module):
    """The conventional classifier, the projector and the predictor, all linear; only training uses them.

    No batch-norm and no hidden layer, as in the authors' code. P is 128 up to D = 256 (their CIFAR ResNet-32) and 256 above.
    """

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        projection_dim = 128 if feature_dim <= 256 else 256
        self.classifier = nn.Linear(feature_dim, num_classes)
        self.projector = nn.Linear(feature_dim, projection_dim)
        self.predictor = nn.Linear(projection_dim, projection_dim)

    def forward(self, features_VD: Tensor) -> HeadOutput:
        """Features [V, D]; under autocast the outputs come in its dtype."""
        projections_VP = self.projector(features_VD)
        return HeadOutput(self.classifier(features_VD), projections_VP, self.predictor(projections_VP))


class GLMCLoss(LossDefaults):
    """L = α·L_plain + (1 − α)·L_reweighted + glmc_consistency_weight·L_consistency, α = 1 − (epoch / epochs)², added up over both views.

    L_plain trains a classifier of the method's own, L_reweighted that of the model, which predicts; both train the backbone. In the first
    epoch α is 1, so the model's classifier predicts nothing yet; a run of one epoch never gets further.
    """

    classifier: ClassVar[str] = "linear"  # of the authors' code

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Keeps the weights of the terms and of the classes."""
        self.consistency_weight = config.glmc_consistency_weight
        self.class_weights_K = class_weights(class_counts_K, config.glmc_label_exponent)

    @staticmethod
    def build_head(config: LossConfig, feature_dim: int, num_classes: int) -> nn.Module:
        """See `Loss`."""
        del config
        return GLMCHead(feature_dim, num_classes)

    def floors(self, num_classes: int) -> dict[str, float]:
        """The consistency is a negative cosine."""
        del num_classes
        return {"consistency": -1.0}

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """See `Loss`."""
        batch_size = len(inputs.mixup.labels_B)
        mixed_VD = inputs.features_VD[batch_size:]
        targets = mixed_views(inputs)
        head: HeadOutput = inputs.heads.method_head(mixed_VD)
        plain = mixed_ce(head.logits_VK, targets)
        reweighted = mixed_ce(inputs.heads.classifier(mixed_VD), targets, self.class_weights_K)
        consistency = negative_cosine(head.predictions_VP, head.projections_VP.roll(batch_size, 0))
        # A tensor: a captured step replays with what it holds then.
        alpha = 1 - inputs.progress.square()
        # Means over both views so far, as they are logged; the authors add the views up, and their rate and weight decay belong to that.
        total = 2 * (alpha * plain + (1 - alpha) * reweighted + self.consistency_weight * consistency)
        terms = {"joint": plain.detach(), "reweighted": reweighted.detach(), "consistency": consistency.detach()}
        return LossOutput(total, terms)


def class_weights(class_counts_K: Tensor, exponent: float) -> Tensor:
    """w_k ∝ n_k^(−exponent), of mean 1 over the classes with images; float32 [K]. A class without images weighs 0: it is no label."""
    present_K = class_counts_K > 0
    weights_K = torch.where(present_K, class_counts_K.clamp_min(1).double() ** -exponent, 0.0)
    return (weights_K * (present_K.sum() / weights_K.sum())).float()


def negative_cosine(predictions_VP: Tensor, projections_VP: Tensor) -> Tensor:
    """−cos(p, sg(z)), mean over the rows; no gradient reaches z (Chen and He 2021, SimSiam, eq. 1–3); []."""
    return -functional.cosine_similarity(widened(predictions_VP), widened(projections_VP.detach()), dim=1).mean()
