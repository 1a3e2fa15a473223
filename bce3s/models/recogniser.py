"""The network that is trained, saved and exported: a backbone with its heads."""

from __future__ import annotations

from torch import Tensor, nn

from bce3s.heads import FeatureMemory, NormalizedClassifier, Projector
from bce3s.models.backbone import Backbone


class Recogniser(nn.Module):
    """Backbone, classifier, projector, feature memory and the method's own layers, all in one state dict.

    A loss that leaves the projector alone gives its parameters no gradient. torch's optimizers skip a parameter whose gradient is
    None, weight decay included, so nothing more is needed as long as gradients are cleared to None (the default of `zero_grad`).
    DistributedDataParallel, however, waits for every parameter that requires a gradient: call
    `recogniser.projector.requires_grad_(False)` before wrapping.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        projection_dim: int,
        classifier: NormalizedClassifier | None = None,
        method_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier or NormalizedClassifier(backbone.feature_dim, num_classes)
        self.projector = Projector(backbone.feature_dim, projection_dim)
        self.feature_memory = FeatureMemory(num_classes, projection_dim)
        self.method_head = method_head or nn.Identity()

    def features(self, images_V3HW: Tensor) -> Tensor:
        """Normalised images [V, 3, H, W] to features [V, D]."""
        features_VD: Tensor = self.backbone(images_V3HW)
        return features_VD

    def forward(self, images_V3HW: Tensor) -> Tensor:
        """Normalised images [V, 3, H, W] to logits [V, K], for inference: the arg max is the prediction."""
        logits_VK: Tensor = self.classifier(self.features(images_V3HW))
        return logits_VK
