"""BCL: logit-compensated cross-entropy and balanced contrastive learning on two augmentations of each image.

Source: Zhu et al., CVPR 2022, "Balanced Contrastive Learning for Long-Tailed Visual Recognition"; where the paper is silent, the authors'
code (FlamieZhu/Balanced-Contrastive-Learning, `loss/` and `models/resnext.py`). What differs from that code:

- Two augmentations, both classified and both contrasted; there a third one is classified alone.
- Prototypes are made of the classifier's rows at length 1; there of the rows as they are, whose length the classifier ignores.
- The contrast is among the images of one rank and one micro-batch; there among those of all GPUs. The prototypes of all classes take
  part everywhere, so no class is ever missing.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bce3s.config import LossConfig
from bce3s.losses.seam import LossDefaults, LossInputs, LossOutput
from bce3s.losses.terms import image_counts, widened


class HeadOutput(NamedTuple):
    """What `BCLHead` makes of samples and classes: float32 rows of length 1, [V, P] and [K, P]."""

    samples_VP: Tensor
    prototypes_KP: Tensor


class BCLHead(nn.Module):
    """Two MLPs of one shape, one for features and one for the classifier's rows; only training uses them.

    P is D/2 and at least 128: 1024 for ResNet-50, as in the authors' code, and 128 for the thin ResNets.
    """

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        projection_dim = max(128, feature_dim // 2)
        self.samples = _MLP(feature_dim, projection_dim)
        self.prototypes = _MLP(feature_dim, projection_dim)

    def forward(self, features_VD: Tensor, rows_KD: Tensor) -> HeadOutput:
        """Features [V, D] and the classifier's rows [K, D]."""
        samples_VP, prototypes_KP = self.samples(features_VD), self.prototypes(rows_KD)
        return HeadOutput(functional.normalize(widened(samples_VP), dim=1), functional.normalize(widened(prototypes_KP), dim=1))


class _MLP(nn.Module):
    """Linear(D, D), batch-norm, ReLU, Linear(D, P)."""

    def __init__(self, feature_dim: int, projection_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(feature_dim, feature_dim)
        # Of images of one pixel: `sync_batch_norm` knows this kind on every device.
        self.norm = nn.BatchNorm2d(feature_dim)
        self.output = nn.Linear(feature_dim, projection_dim)

    def forward(self, rows_VD: Tensor) -> Tensor:
        normalized_VD = self.norm(self.hidden(rows_VD)[:, :, None, None]).flatten(1)
        projections_VP: Tensor = self.output(functional.relu(normalized_VD, inplace=True))
        return projections_VP


class BCLLoss(LossDefaults):
    """L = L_CE + bcl_contrastive_weight·L_BCL: each a mean over the 2B views; the batch's mixing is not used."""

    views: ClassVar[str] = "pair"
    classifier: ClassVar[str] = "cosine"  # of the authors' code, at the same scale of 30

    def __init__(self, config: LossConfig, class_counts_K: Tensor) -> None:
        """Keeps the weight, the temperature and the log-priors; a class without images counts as if it had one."""
        self.contrastive_weight, self.temperature = config.bcl_contrastive_weight, config.bcl_temperature
        counts_K = image_counts(class_counts_K)
        self.log_priors_K = (counts_K / counts_K.sum()).log().float()

    @staticmethod
    def build_head(config: LossConfig, feature_dim: int, num_classes: int) -> nn.Module:
        """See `Loss`."""
        del config, num_classes
        return BCLHead(feature_dim)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """See `Loss`."""
        heads, labels_V = inputs.heads, inputs.mixup.labels_B.repeat(2)
        # The compensation: training sees z_k + log π_k, and prediction z_k (Menon et al. 2021, eq. 10; Ren et al. 2020).
        logits_VK = widened(heads.classifier(inputs.features_VD)) + self.log_priors_K
        joint = functional.cross_entropy(logits_VK, labels_V)
        head: HeadOutput = heads.method_head(inputs.features_VD, heads.classifier.normalized_weight())
        contrastive = balanced_contrastive(head.samples_VP, head.prototypes_KP, labels_V, self.temperature)
        total = joint + self.contrastive_weight * contrastive
        return LossOutput(total, {"joint": joint.detach(), "contrastive": contrastive.detach()})


def balanced_contrastive(samples_VP: Tensor, prototypes_KP: Tensor, labels_V: Tensor, temperature: float) -> Tensor:
    """The balanced contrastive loss, mean over the samples, [].

    That of sample i of class y, whose cosines with others are s_ia, is

        log Σ_k mean_{a ∈ A_k} exp(s_ia/τ) − mean_{a ∈ A_y} s_ia/τ.

    A_k holds the samples of class k other than i, and its prototype (class-complement). So each class weighs as one in the denominator,
    however many samples it has (class-averaging); there are always positives, of which the prototype is one.

    Args:
        samples_VP: float32 or float64 [V, P], rows of length 1.
        prototypes_KP: [K, P], the same, one for each class.
        labels_V: int64 [V].
        temperature: τ.
    """
    num_samples, num_classes = len(samples_VP), len(prototypes_KP)
    labels_C = torch.cat([labels_V, torch.arange(num_classes, device=labels_V.device)])
    # Autocast would round the cosines to 8 bits, and τ multiplies what that loses.
    with torch.autocast(samples_VP.device.type, enabled=False):
        cosines_VC = samples_VP @ torch.cat([samples_VP, prototypes_KP]).T / temperature
    itself_VC = torch.eye(num_samples, len(labels_C), dtype=torch.bool, device=labels_V.device)
    same_VC = labels_V[:, None] == labels_C
    sizes_K = torch.ones_like(prototypes_KP[:, 0]).index_add(0, labels_V, torch.ones_like(samples_VP[:, 0]))
    # |A_k|, with the prototype: one less in the sample's own class, as it does not meet itself.
    averaged_VC = (cosines_VC - (sizes_K[labels_C] - same_VC.to(sizes_K.dtype)).log()).masked_fill(itself_VC, -torch.inf)
    positives_VC = same_VC & ~itself_VC
    return (averaged_VC.logsumexp(1) - (cosines_VC * positives_VC).sum(1) / positives_VC.sum(1)).mean()
