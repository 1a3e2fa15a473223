"""The network without what only training needs: a backbone and one plain linear layer, float32 on the CPU."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bce3s import __version__
from bce3s.evaluate.split import classifier_rows
from bce3s.heads import NORM_EPS
from bce3s.losses import resolve_method
from bce3s.models import Backbone, CosineClassifier, Recogniser
from bce3s.train import TrainedNetwork, retrained_with
from pipelines.augment.mix import channel_statistics
from pipelines.config import AugmentConfig

METADATA_VERSION = "1"


class PlainNetwork(nn.Module):
    """Images to logits by `backbone` and `fc`, the latter with the rows as they meet the features.

    Args:
        backbone: images [B, 3, H, W] to features [B, D].
        fc: features to logits [B, K].
        unit_features: features are brought to length 1 before `fc`, as a cosine classifier does.
    """

    def __init__(self, backbone: Backbone, fc: nn.Linear, *, unit_features: bool) -> None:
        super().__init__()
        self.backbone, self.fc, self.unit_features = backbone, fc, unit_features

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, float32 [B, 3, H, W], to logits [B, K]."""
        features_BD = self.backbone(images)
        if self.unit_features:
            features_BD = F.normalize(features_BD, dim=1, eps=NORM_EPS)
        logits_BK: Tensor = self.fc(features_BD)
        return logits_BK

    def weights(self) -> dict[str, Tensor]:
        """Of inference: `backbone.…`, `fc.weight` [K, D], `fc.bias` [K]; copies, for safetensors refuses tensors that share memory."""
        return {name: tensor.clone() for name, tensor in self.state_dict().items()}


class FromPixels(nn.Module):
    """A network with its normalisation in front: takes pixels as they are decoded and cropped."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: PlainNetwork, augment: AugmentConfig) -> None:
        super().__init__()
        self.network = network
        for name, values in zip(("mean", "std"), channel_statistics(augment, torch.device("cpu")), strict=True):
            self.register_buffer(name, values)

    def forward(self, images: Tensor) -> Tensor:
        """Pixels, uint8 [B, H, W, 3], to logits [B, K]."""
        logits_BK: Tensor = self.network(((images.to(torch.float32) - self.mean) / self.std).permute(0, 3, 1, 2))
        return logits_BK


@torch.no_grad()
def plain_network(model: Recogniser) -> PlainNetwork:
    """A copy of what `model` computes, float32 on the CPU, weights contiguous, in evaluation mode.

    Rows that the classifier normalises are stored at length 1, and a cosine classifier's at its scale: the same logits to rounding.
    """
    classifier = model.classifier
    fc = nn.utils.skip_init(nn.Linear, classifier.in_features, classifier.out_features)
    fc.weight.copy_(classifier.scale * classifier_rows(classifier))
    fc.bias.copy_(torch.zeros_like(fc.bias) if classifier.bias is None else classifier.bias)
    network = PlainNetwork(copy.deepcopy(model.backbone), fc, unit_features=isinstance(classifier, CosineClassifier))
    network.to(device="cpu", dtype=torch.float32, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return network.requires_grad_(False).eval()


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is exported, and what is known of it.

    Args:
        network: for inference.
        trained: where it came from.
        average: its weights are the moving average.
    """

    network: PlainNetwork
    trained: TrainedNetwork
    average: bool = False

    @property
    def arch(self) -> str:
        """Name of the backbone."""
        return self.trained.config.model.arch

    @property
    def image_size(self) -> int:
        """Side in pixels of what the network was evaluated on."""
        return self.trained.config.data.image_size

    @property
    def augment(self) -> AugmentConfig:
        """Mean, std and the crop of evaluation."""
        return self.trained.config.data.augment

    @property
    def retrained_with(self) -> str:
        """The method of a stage two; empty for a stage one."""
        return retrained_with(self.trained.state, self.trained.run)

    @property
    def method(self) -> str:
        """Of training, and of the classifier's retraining: "bce3s", "bce3s, classifier retrained by lws"."""
        title = self.trained.config.loss.title
        return f"{title}, classifier retrained by {self.retrained_with}" if self.retrained_with else title

    def metadata(self) -> dict[str, str]:
        """What a program needs beside the weights, lists and numbers as JSON; stored inside the files that have room for it."""
        augment = self.augment
        values: dict[str, Any] = {
            "class_names": list(self.trained.class_names),
            "class_counts": self.trained.class_counts_K.tolist(),
            "image_size": self.image_size,
            "mean": augment.mean,
            "std": augment.std,
            "eval_crop": augment.eval_crop,
            "unit_features": self.network.unit_features,
            "model": asdict(replace(resolve_method(self.trained.config).model, pretrained="")),
        }
        texts = {"arch": self.arch, "dataset": self.trained.config.dataset, "method": self.method, "bce3s": __version__}
        return {"format": "bce3s-export", "version": METADATA_VERSION, **texts, **{name: json.dumps(values[name]) for name in values}}
