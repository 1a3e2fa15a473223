"""BCL against its equations written as loops, and what class-averaging and class-complement promise."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional

from bce3s.config import LossConfig
from bce3s.losses import LossInputs, MixedTargets, build_loss
from bce3s.losses.bcl import BCLHead, balanced_contrastive
from bce3s.models import build_classifier

COUNTS = (40, 12, 3, 1, 1)
CONFIG = LossConfig(name="bcl", bcl_contrastive_weight=0.35, bcl_temperature=0.1)
LABELS_B = torch.tensor([0, 2, 0, 3, 0, 1])  # class 4 is absent


def inputs_for(num_classes: int = 5, labels_B: Tensor = LABELS_B, *, dtype: Any = torch.float64, **changes: Any) -> LossInputs:
    torch.manual_seed(0)
    if "heads" not in changes:
        changes["heads"] = SimpleNamespace(
            classifier=build_classifier("cosine", 6, num_classes).to(dtype), method_head=BCLHead(6).to(dtype)
        )
    targets = MixedTargets(labels_B, labels_B, torch.tensor(0.3))
    given_values: dict[str, Any] = {
        "features_VD": torch.randn(2 * len(labels_B), 6, dtype=dtype).requires_grad_(),
        "mixup": targets,
        "cutmix": targets,
        "epoch": 0,
        "num_epochs": 10,
        "progress": torch.tensor(0.0),
        "batch_labels_G": labels_B,
        "draw_key": torch.tensor(7),
    }
    return LossInputs(**{**given_values, **changes})


def loss_of(inputs: LossInputs, counts: tuple[int, ...] = COUNTS, config: LossConfig = CONFIG) -> Any:
    return build_loss(config, torch.tensor(counts))(inputs)


def unit_rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)


# ---- the paper's equations, a sample and a class at a time


def contrast_by_loops(samples_VP: Tensor, prototypes_KP: Tensor, labels: list[int], temperature: float) -> Tensor:
    losses = []
    for i, label in enumerate(labels):
        per_class = []
        for k, prototype_P in enumerate(prototypes_KP):
            members = [samples_VP[j] for j in range(len(labels)) if labels[j] == k and j != i] + [prototype_P]
            scores = [(samples_VP[i] * member).sum() / temperature for member in members]
            per_class.append(sum(score.exp() for score in scores) / len(scores))
            if k == label:
                positive = scores
        losses.append(-sum((score.exp() / sum(per_class)).log() for score in positive) / len(positive))
    return torch.stack(losses).mean()


def mlp(module: Any, rows_VD: Tensor) -> Tensor:
    """Linear, batch-norm by the rows' own statistics, ReLU, linear, length 1."""
    hidden = rows_VD @ module.hidden.weight.T + module.hidden.bias
    centred = hidden - hidden.mean(0)
    normalized = centred / (centred.square().mean(0) + 1e-5).sqrt() * module.norm.weight + module.norm.bias
    projected = normalized.clamp_min(0) @ module.output.weight.T + module.output.bias
    scaled: Tensor = projected / projected.square().sum(1, keepdim=True).sqrt()
    return scaled


def by_equations(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    weight_KD, head = inputs.heads.classifier.weight, inputs.heads.method_head  # type: ignore[attr-defined]
    rows_KD = weight_KD / weight_KD.square().sum(1, keepdim=True).sqrt()
    labels = [*inputs.mixup.labels_B.tolist()] * 2
    joint = []
    for x, label in zip(inputs.features_VD, labels, strict=True):
        z = [30 * (x * w).sum() / x.square().sum().sqrt() + math.log(n / sum(COUNTS)) for w, n in zip(rows_KD, COUNTS, strict=True)]
        joint.append(torch.stack(z).exp().sum().log() - z[label])
    mean = torch.stack(joint).mean()
    contrast = contrast_by_loops(mlp(head.samples, inputs.features_VD), mlp(head.prototypes, rows_KD), labels, 0.1)
    return mean + 0.35 * contrast, mean, contrast


def test_value_and_gradients_are_those_of_the_equations() -> None:
    inputs = inputs_for()
    total, joint, contrast = by_equations(inputs)
    output = loss_of(inputs)
    # The priors are float32.
    torch.testing.assert_close(output.terms["joint"], joint.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.terms["contrastive"], contrast.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.total, total, rtol=1e-6, atol=1e-6)
    heads: Any = inputs.heads
    wanted = [inputs.features_VD, heads.classifier.weight, *heads.method_head.parameters()]
    for found, expected in zip(torch.autograd.grad(output.total, wanted), torch.autograd.grad(total, wanted), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=8), temperature=st.floats(0.05, 2), seed=st.integers(0, 99))
def test_the_contrast_is_that_of_the_loops_for_any_labels(labels: list[int], temperature: float, seed: int) -> None:
    samples_VP, prototypes_KP = unit_rows(len(labels), 3, seed=seed).requires_grad_(), unit_rows(5, 3, seed=seed + 1).requires_grad_()
    found = balanced_contrastive(samples_VP, prototypes_KP, torch.tensor(labels), temperature)
    expected = contrast_by_loops(samples_VP, prototypes_KP, labels, temperature)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(value, (samples_VP, prototypes_KP)) for value in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


# ---- cases worked out by hand


def test_one_image_and_two_classes_by_hand() -> None:
    """Views at 0° and 90°; prototypes at 0° and 180°; τ = 1.

    First view: others of its class e^0 and e^1, mean (1 + e)/2, the other class e^−1. Second view: e^0 and e^0, and e^0.
    """
    samples_VP = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    prototypes_KP = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    first = math.log((1 + math.e) / 2 + math.exp(-1)) - 0.5
    second = math.log(1 + 1) - 0.0
    found = balanced_contrastive(samples_VP, prototypes_KP, torch.tensor([0, 0]), 1.0)
    assert found.item() == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("labels", [(0, 0, 0, 0), (0, 1, 2, 3), (0, 0, 0, 3)])
def test_at_the_simplex_every_batch_has_the_same_loss(labels: tuple[int, ...]) -> None:
    """log(1 + (K−1)·exp(−K/((K−1)τ))), however many samples a class has: what class-averaging is for."""
    vertices_KP = functional.normalize(torch.eye(4, dtype=torch.float64) - 0.25, dim=1)
    labels_V = torch.tensor(labels)
    found = balanced_contrastive(vertices_KP[labels_V], vertices_KP, labels_V, 0.5)
    assert found.item() == pytest.approx(math.log(1 + 3 * math.exp(-4 / 3 / 0.5)))


def test_one_class_alone_is_contrasted_with_the_prototypes_of_the_others() -> None:
    samples_VP, prototypes_KP = unit_rows(4, 3), unit_rows(5, 3, seed=1).requires_grad_()
    loss = balanced_contrastive(samples_VP, prototypes_KP, torch.zeros(4, dtype=torch.int64), 0.1)
    (gradient_KP,) = torch.autograd.grad(loss, prototypes_KP)
    assert math.isfinite(loss.item())
    assert gradient_KP.abs().sum(1).all()


# ---- limiting cases and what it depends on


def test_equal_counts_and_no_contrast_are_plain_cross_entropy() -> None:
    inputs = inputs_for()
    config = LossConfig(name="bcl", bcl_contrastive_weight=0.0)
    expected = functional.cross_entropy(inputs.heads.classifier(inputs.features_VD), LABELS_B.repeat(2))
    torch.testing.assert_close(loss_of(inputs, (7, 7, 7, 7, 7), config).total, expected, rtol=1e-6, atol=1e-6)
    assert abs(loss_of(inputs, COUNTS, config).total - expected) > 0.1


def test_a_class_without_images_counts_as_one_image() -> None:
    found, expected = (loss_of(inputs_for(), counts).total for counts in ((40, 12, 3, 1, 0), (40, 12, 3, 1, 1)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # all priors are 57/56 of those, which the softmax ignores


def test_the_order_of_images_and_of_views_does_not_matter() -> None:
    inputs, order = inputs_for(), torch.tensor([3, 0, 5, 4, 1, 2])
    first, second = inputs.features_VD.chunk(2)
    for features_VD, seen in ((torch.cat([first[order], second[order]]), LABELS_B[order]), (torch.cat([second, first]), LABELS_B)):
        permuted = inputs_for(labels_B=seen, features_VD=features_VD)
        torch.testing.assert_close(loss_of(permuted).total, loss_of(inputs).total)


def test_views_are_paired_by_halves() -> None:
    """[2B] is one view after the other; taken as neighbours the labels would be wrong."""
    inputs = inputs_for()
    interleaved = torch.stack(inputs.features_VD.chunk(2), 1).flatten(0, 1)
    assert abs(loss_of(inputs_for(features_VD=interleaved)).total - loss_of(inputs).total) > 0.01


def test_mixing_has_no_part() -> None:
    other = MixedTargets(LABELS_B, LABELS_B.flip(0), torch.tensor(0.9))
    assert torch.equal(loss_of(inputs_for(mixup=other, cutmix=other)).total, loss_of(inputs_for()).total)


# ---- safety


@pytest.mark.parametrize("num_classes", [10, 8142])
@pytest.mark.parametrize(("scale", "autocast"), [(1.0, False), (1e4, False), (1e4, True)])
def test_stays_finite(num_classes: int, scale: float, autocast: bool) -> None:
    inputs = inputs_for(num_classes, dtype=torch.float32)
    scaled = inputs_for(num_classes, dtype=torch.float32, features_VD=(scale * inputs.features_VD.detach()).requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = loss_of(scaled, tuple(1 + 1000 // (k + 1) for k in range(num_classes)))
    heads: Any = scaled.heads
    wanted = [scaled.features_VD, heads.classifier.weight, *heads.method_head.parameters()]
    assert output.total.dtype == torch.float32
    assert math.isfinite(output.total.item())
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.total, wanted))


def test_cosines_are_not_rounded_under_autocast() -> None:
    samples_VP, prototypes_KP, labels_V = unit_rows(8, 16), unit_rows(5, 16, seed=1), torch.arange(8) % 5
    exact = balanced_contrastive(samples_VP, prototypes_KP, labels_V, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = balanced_contrastive(samples_VP.float(), prototypes_KP.float(), labels_V, 0.1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_never_asks_the_host() -> None:
    """Fake tensors have no values: reading one, or a shape that depends on values, raises."""
    with FakeTensorMode():
        heads = SimpleNamespace(classifier=build_classifier("cosine", 6, 5), method_head=BCLHead(6))
        features_VD, labels_B = torch.empty(12, 6).requires_grad_(), torch.empty(6, dtype=torch.int64)
        inputs, counts_K = inputs_for(labels_B=labels_B, features_VD=features_VD, heads=heads), torch.empty(5, dtype=torch.int64)
        build_loss(CONFIG, counts_K)(inputs).total.backward()
        assert inputs.features_VD.grad is not None
        with pytest.raises(DataDependentOutputException):
            inputs.features_VD.sum().item()


@pytest.mark.parametrize(("feature_dim", "projection_dim"), [(64, 128), (512, 256), (2048, 1024)])
def test_the_heads_are_of_the_authors_sizes(feature_dim: int, projection_dim: int) -> None:
    with torch.device("meta"):
        head = BCLHead(feature_dim)
        output = head(torch.empty(4, feature_dim), torch.empty(7, feature_dim))
    assert [tuple(values.shape) for values in output] == [(4, projection_dim), (7, projection_dim)]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in head.modules()) == 2
