"""What each method of stage two trains, and the classifier that comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bce3s.config import ModelConfig, RetrainConfig
from bce3s.heads import NORM_EPS, LinearClassifier, NormalizedClassifier, build_classifier
from pipelines.types import ConfigError


class LearnedScales(nn.Module):
    """LWS (Kang et al. 2020, section 4, "learnable weight scaling"): f_k·(w_k·x + b_k), one learned f_k a class that starts at 1.

    Rows and biases stay as they are. The bias is scaled with its row, as in the authors' code; w_k is the normalised row where the
    classifier normalises.
    """

    def __init__(self, classifier: NormalizedClassifier) -> None:
        """Keeps `classifier`, whose parameters take no gradient from here on."""
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.scales_K = nn.Parameter(torch.ones(classifier.out_features, device=classifier.weight.device))

    def forward(self, features_BD: Tensor) -> Tensor:
        """Features [B, D] to logits [B, K]."""
        logits_BK: Tensor = self.scales_K * self.classifier(features_BD)
        return logits_BK

    @torch.no_grad()
    def folded(self) -> LinearClassifier:
        """The linear classifier with rows f_k·w_k and biases f_k·b_k: the same logits to rounding."""
        plain = isinstance(self.classifier, LinearClassifier)
        rows_KD = self.classifier.weight if plain else self.classifier.normalized_weight()
        return _linear(self.scales_K[:, None] * rows_KD, self.scales_K * self.classifier.bias)


@torch.no_grad()
def tau_normalized(classifier: LinearClassifier, tau: float) -> LinearClassifier:
    """Rows w_k/‖w_k‖^τ without biases (Kang et al. 2020, section 4, "τ-normalized classifier", which drops them).

    τ = 0 leaves the rows, τ = 1 is unit rows.
    """
    lengths_K = classifier.weight.norm(dim=1, keepdim=True).clamp_min(NORM_EPS)
    return _linear(classifier.weight / lengths_K**tau, torch.zeros_like(classifier.bias))


def _linear(weight_KD: Tensor, bias_K: Tensor) -> LinearClassifier:
    linear = LinearClassifier(weight_KD.shape[1], len(weight_KD)).to(weight_KD.device)
    linear.weight.copy_(weight_KD)
    linear.bias.copy_(bias_K)
    return linear


@dataclass(frozen=True)
class Retraining:
    """One method applied to one classifier.

    Args:
        trained: features [B, D] to logits [B, K]; its parameters with gradients are what is trained, none of "tau-norm".
        result: the classifier as it stands, to be saved in place of stage one's.
        kind: what `model.classifier` is for the result.
    """

    trained: nn.Module
    result: Callable[[], NormalizedClassifier]
    kind: str


def require_classifier_fits(method: str, kind: str) -> None:
    """Raises `ConfigError` where a method does nothing to a classifier of this kind, or could not be saved as one.

    Args:
        method: of `RETRAIN_METHODS`.
        kind: of `CLASSIFIERS`.
    """
    if method == "tau-norm" and kind != "linear":
        raise ConfigError(
            f"tau-norm does nothing to a {kind} classifier, whose rows have length 1 already; "
            "train stage one with --set model.classifier=linear, or take --method bce, crt or lws"
        )
    if method == "lws" and kind == "cosine":
        raise ConfigError("lws cannot be saved as a cosine classifier, whose rows hold no scale; take --method crt or bce")


def start_retraining(classifier: NormalizedClassifier, model: ModelConfig, config: RetrainConfig, seed: int) -> Retraining:
    """The method `config.method` before its first step.

    Args:
        classifier: of stage one, on the device of the run; "bce" goes on with it in place.
        model: of stage one, its classifier named.
        config: of stage two.
        seed: of the fresh weights of "crt".

    Raises:
        ConfigError: the method does not fit the classifier.
    """
    require_classifier_fits(config.method, model.classifier)
    if config.method == "lws":
        scaled = LearnedScales(classifier)
        return Retraining(scaled, scaled.folded, "linear")
    if config.method == "tau-norm":
        assert isinstance(classifier, LinearClassifier)
        normalized = tau_normalized(classifier, config.tau).requires_grad_(False)
        return Retraining(normalized, lambda: normalized, "linear")
    if config.method == "crt":
        classifier = _fresh(classifier, model, seed)
    return Retraining(classifier.requires_grad_(True), lambda: classifier, model.classifier)


def _fresh(classifier: NormalizedClassifier, model: ModelConfig, seed: int) -> NormalizedClassifier:
    """cRT (Kang et al. 2020, section 4, "classifier re-training"): another of the same kind, drawn on the CPU: the same on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_classifier(model.classifier, classifier.in_features, classifier.out_features, model.classifier_scale)
    return fresh.to(classifier.weight.device)
