"""The network that a run can ask for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pipelines.config import require, require_choice

CLASSIFIERS = ("normalized", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network.

    Args:
        arch: a name of `bce3s.models.ARCHS`, `timm:NAME`, or `package.module:factory`, a callable that returns any network for features.
        projection_dim: P of the projector and the feature memory.
        pretrained: path of a state dict for the backbone, .pth or .safetensors; "timm" downloads that of a `timm:NAME`; empty trains from
            scratch.
        classifier: "normalized" rows on plain features (BCE3S), plain "linear", "cosine" of features and rows; "auto" is the method's.
        classifier_scale: what "cosine" multiplies its cosines by.
        bias_prior: the classifier's biases start at −log(K − 1), where sigmoids give each class the prior 1/K (Lin et al. 2017, 3.3).
    """

    arch: str = "resnet32-cifar"
    projection_dim: int = 128
    pretrained: str = ""
    classifier: str = "auto"
    classifier_scale: float = 30.0
    bias_prior: bool = False

    @property
    def title(self) -> str:
        """`arch` as part of a file's name: timm-convnext_tiny."""
        return re.sub(r"[^\w.-]+", "-", self.arch)

    def __post_init__(self) -> None:
        downloads = self.pretrained == "timm" and not self.arch.startswith("timm:")
        require(not downloads, f"pretrained=timm is for an arch timm:NAME, not {self.arch}: name a file of weights")
        require(self.projection_dim >= 1, f"projection_dim must be at least 1, not {self.projection_dim}")
        require_choice("classifier", self.classifier, ("auto", *CLASSIFIERS))
        require(0 < self.classifier_scale < math.inf, f"classifier_scale must be positive, not {self.classifier_scale}")
        require(self.classifier != "cosine" or not self.bias_prior, "a cosine classifier has no biases: leave bias_prior off")
