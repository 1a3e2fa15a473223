"""What the methods of stage two make of a classifier: scales that fold, rows that are normalised, rows that are shortened."""

from __future__ import annotations

import pytest
import torch

from bce3s.config import ModelConfig, RetrainConfig
from bce3s.models import CosineClassifier, LinearClassifier, NormalizedClassifier, build_classifier
from bce3s.retrain.classifiers import LearnedScales, start_retraining, tau_normalized
from bce3s.retrain.max_norm import MaxNorm
from pipelines.types import ConfigError

FEATURES_BD = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


def classifier_of(kind: str) -> NormalizedClassifier:
    torch.manual_seed(0)
    return build_classifier(kind, 6, 4)


@pytest.mark.parametrize("kind", ["normalized", "linear"])
def test_learned_scales_fold_into_a_linear_classifier_of_equal_logits(kind: str) -> None:
    scaled = LearnedScales(classifier_of(kind))
    assert torch.equal(scaled(FEATURES_BD), scaled.classifier(FEATURES_BD))  # where it starts
    with torch.no_grad():
        scaled.scales_K.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
    torch.testing.assert_close(scaled.folded()(FEATURES_BD), scaled(FEATURES_BD), rtol=1e-5, atol=1e-6)
    assert [name for name, parameter in scaled.named_parameters() if parameter.requires_grad] == ["scales_K"]


def test_tau_zero_leaves_the_rows_and_tau_one_gives_unit_rows() -> None:
    linear = classifier_of("linear")
    assert isinstance(linear, LinearClassifier)
    assert torch.equal(tau_normalized(linear, 0.0).weight, linear.weight)
    unit = tau_normalized(linear, 1.0)
    torch.testing.assert_close(unit.weight.norm(dim=1), torch.ones(4))
    half = tau_normalized(linear, 0.5).weight
    torch.testing.assert_close(half, linear.weight / linear.weight.norm(dim=1, keepdim=True).sqrt())
    assert not unit.bias.any()


@pytest.mark.parametrize("kind", ["normalized", "linear", "cosine"])
def test_crt_starts_from_a_fresh_classifier_of_the_seed_alone(kind: str) -> None:
    old, model = classifier_of(kind), ModelConfig(classifier=kind)
    before = torch.get_rng_state()
    first, again, other = (start_retraining(old, model, RetrainConfig(method="crt"), seed).result() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert type(first) is type(old)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert not torch.equal(first.weight, old.weight)


@pytest.mark.parametrize(("method", "kind"), [("tau-norm", "normalized"), ("tau-norm", "cosine"), ("lws", "cosine")])
def test_a_method_that_would_do_nothing_is_refused(method: str, kind: str) -> None:
    with pytest.raises(ConfigError, match="model.classifier=linear" if method == "tau-norm" else "take --method crt or bce"):
        start_retraining(classifier_of(kind), ModelConfig(classifier=kind), RetrainConfig(method=method), 0)


def test_max_norm_shortens_long_rows_only() -> None:
    weight_KD = torch.diag(torch.tensor([1.0, 1.05, 2.0]))
    max_norm = MaxNorm(weight_KD, 0.1)
    assert max_norm.threshold.item() == pytest.approx(1.1)
    moved_KD = torch.diag(torch.tensor([1.09, 3.0, 0.2]))
    max_norm.project(moved_KD)
    torch.testing.assert_close(moved_KD.diagonal(), torch.tensor([1.09, 1.1, 0.2]))
    assert moved_KD[0, 0] == torch.tensor(1.09)  # not a bit


def test_max_norm_does_not_change_what_normalised_rows_predict() -> None:
    for classifier in (classifier_of("normalized"), classifier_of("cosine")):
        assert isinstance(classifier, (NormalizedClassifier, CosineClassifier))
        before = classifier(FEATURES_BD).detach()
        MaxNorm(classifier.weight, 0.1).project(classifier.weight)
        torch.testing.assert_close(classifier(FEATURES_BD).detach(), before, rtol=1e-5, atol=1e-6)


def test_max_norm_where_no_row_is_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match="lws trains none"):
        RetrainConfig(method="lws", max_norm=0.1)


@pytest.mark.parametrize(
    ("method", "batch_size", "rate", "decay"),
    [("bce", 64, 1e-4, 0.0), ("bce", 256, 4e-4, 0.0), ("crt", 512, 0.2, 5e-4), ("crt", 64, 0.025, 5e-4), ("lws", 64, 0.025, 5e-4)],
)
def test_each_method_has_a_rate_and_a_weight_decay_of_its_own(method: str, batch_size: int, rate: float, decay: float) -> None:
    own = RetrainConfig(method=method, batch_size=batch_size).resolved()
    assert (own.learning_rate, own.weight_decay) == (pytest.approx(rate), decay)
    assert own.resolved() == own
    given = RetrainConfig(method=method, learning_rate=0.3, weight_decay=0.0)
    assert given.resolved() == given


def test_another_method_takes_over_neither_rate_nor_weight_decay() -> None:
    saved = RetrainConfig(method="bce", learning_rate=1e-4, weight_decay=0.0, epochs=3)
    assert saved.for_method("bce") == saved
    assert saved.for_method("crt") == RetrainConfig(method="crt", epochs=3)


@pytest.mark.parametrize("decay", [-0.5, float("inf"), float("nan")])
def test_a_weight_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="weight_decay is 0 or more, or -1 for the method's own"):
        RetrainConfig(weight_decay=decay)
