"""GLMC against its equations written as loops, and what its parts may and may not train."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bce3s.config import LossConfig
from bce3s.losses import LossInputs, MixedTargets, build_loss, loss_class
from bce3s.losses.glmc import GLMCHead, class_weights, negative_cosine
from bce3s.models import build_classifier

COUNTS = (40, 12, 3, 1)
CONFIG = LossConfig(name="glmc", glmc_label_exponent=1.2, glmc_consistency_weight=4.0)


def inputs_for(
    num_classes: int = 4, batch_size: int = 5, feature_dim: int = 6, *, dtype: Any = torch.float64, **changes: Any
) -> LossInputs:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    heads = SimpleNamespace(
        classifier=build_classifier("linear", feature_dim, num_classes).to(dtype),
        method_head=loss_class("glmc").build_head(CONFIG, feature_dim, num_classes).to(dtype),
    )
    labels, partners = (torch.randint(0, num_classes, (batch_size,), generator=generator) for _ in range(2))
    given_values: dict[str, Any] = {
        "features_VD": torch.randn(3 * batch_size, feature_dim, generator=generator, dtype=dtype).requires_grad_(),
        "mixup": MixedTargets(labels, partners, torch.tensor(0.3)),
        "cutmix": MixedTargets(labels, partners, torch.tensor(0.8)),
        "heads": heads,
        "epoch": 5,
        "num_epochs": 10,
        "progress": torch.tensor(0.5),
        "batch_labels_G": labels,
        "draw_key": torch.tensor(7),
    }
    return LossInputs(**{**given_values, **changes})


def loss_of(inputs: LossInputs, counts: tuple[int, ...] = COUNTS, config: LossConfig = CONFIG) -> Any:
    return build_loss(config, torch.tensor(counts))(inputs)


def parameters_of(inputs: LossInputs) -> dict[str, Tensor]:
    modules = {"classifier": inputs.heads.classifier, "head": inputs.heads.method_head}
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.named_parameters()}  # type: ignore[attr-defined]


def gradients_of(total: Tensor, inputs: LossInputs) -> dict[str, Tensor]:
    wanted = {"features": inputs.features_VD, **parameters_of(inputs)}
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {name: torch.zeros_like(wanted[name]) if value is None else value for name, value in zip(wanted, found, strict=True)}


# ---- the paper's equations, a row and a class at a time


def affine(layer: nn.Linear, row_D: Tensor) -> list[Tensor]:
    return [
        sum((w * x for w, x in zip(weights, row_D, strict=True)), start=bias)
        for weights, bias in zip(layer.weight, layer.bias, strict=True)
    ]


def cross_entropy(logits: list[Tensor], label: int) -> Tensor:
    return torch.stack([z.exp() for z in logits]).sum().log() - logits[label]


def cosine(first: list[Tensor], second: list[Tensor]) -> Tensor:
    def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return torch.stack([x * y for x, y in zip(a, b, strict=True)]).sum()

    return dot(first, second) / (dot(first, first) * dot(second, second)).sqrt()


def by_loops(inputs: LossInputs, *, stop: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    weights = [n**-1.2 for n in COUNTS]
    weights = [len(COUNTS) * w / sum(weights) for w in weights]
    head: Any = inputs.heads.method_head
    batch_size = len(inputs.mixup.labels_B)
    terms: dict[str, list[Tensor]] = {"joint": [], "reweighted": [], "consistency": []}
    for i in range(batch_size):
        views = [(inputs.features_VD[batch_size + i], inputs.mixup), (inputs.features_VD[2 * batch_size + i], inputs.cutmix)]
        for row_D, target in views:
            parts = ((int(target.labels_B[i]), float(target.lam)), (int(target.partner_labels_B[i]), 1 - float(target.lam)))
            plain, balanced = affine(head.classifier, row_D), affine(inputs.heads.classifier, row_D)  # type: ignore[arg-type]
            terms["joint"].append(torch.stack([share * cross_entropy(plain, label) for label, share in parts]).sum())
            weighted = [share * weights[label] * cross_entropy(balanced, label) for label, share in parts]
            terms["reweighted"].append(torch.stack(weighted).sum())
        z = [affine(head.projector, row_D) for row_D, _ in views]
        p = [affine(head.predictor, torch.stack(each)) for each in z]
        z = [[value.detach() for value in each] for each in z] if stop else z
        terms["consistency"].append(-0.5 * (cosine(p[0], z[1]) + cosine(p[1], z[0])))
    means = {name: torch.stack(values).mean() for name, values in terms.items()}
    alpha = 1 - float(inputs.progress) ** 2
    of_a_view = alpha * means["joint"] + (1 - alpha) * means["reweighted"] + 4.0 * means["consistency"]
    return 2 * of_a_view, means


@pytest.fixture
def _small_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three dimensions, so that loops over 128 × 128 weights do not take a minute."""

    def build(config: LossConfig, feature_dim: int, num_classes: int) -> nn.Module:
        head = GLMCHead(feature_dim, num_classes)
        head.projector, head.predictor = nn.Linear(feature_dim, 3), nn.Linear(3, 3)
        return head

    monkeypatch.setattr(loss_class("glmc"), "build_head", staticmethod(build))


@pytest.mark.usefixtures("_small_projections")
@pytest.mark.parametrize("progress", [0.0, 0.6])
def test_value_and_gradients_are_those_of_the_equations(progress: float) -> None:
    inputs = inputs_for(progress=torch.tensor(progress, dtype=torch.float64))
    output = loss_of(inputs)
    total, means = by_loops(inputs)
    torch.testing.assert_close(output.total, total, rtol=1e-6, atol=1e-6)  # λ and the class weights are float32
    for name, mean in means.items():
        torch.testing.assert_close(output.terms[name], mean.detach(), rtol=1e-6, atol=1e-6)
    found, expected = gradients_of(output.total, inputs), gradients_of(total, inputs)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.usefixtures("_small_projections")
def test_the_stopped_gradient_really_stops() -> None:
    inputs = inputs_for()
    found = gradients_of(loss_of(inputs).total, inputs)
    flowing = gradients_of(by_loops(inputs, stop=False)[0], inputs)
    for name in ("features", "head.projector.weight"):
        assert (found[name] - flowing[name]).abs().max() > 0.01
    torch.testing.assert_close(found["head.predictor.weight"], flowing["head.predictor.weight"], rtol=1e-5, atol=1e-7)


def test_no_gradient_reaches_what_is_predicted() -> None:
    p_VP, z_VP = (torch.randn(4, 3).requires_grad_() for _ in range(2))
    negative_cosine(p_VP, z_VP).backward()
    assert p_VP.grad is not None
    assert z_VP.grad is None


# ---- the schedule


@pytest.mark.parametrize("epoch", [0, 1, 5, 9])
def test_alpha_falls_with_the_square_of_the_epoch(epoch: int) -> None:
    """α = 1 − (epoch/epochs)²: 1, 0.99, 0.75, 0.19."""
    inputs = inputs_for(epoch=epoch, progress=torch.tensor(epoch / 10))
    output = loss_of(inputs)
    alpha = {0: 1.0, 1: 0.99, 5: 0.75, 9: 0.19}[epoch]
    joint, reweighted, consistency = (output.terms[name].item() for name in ("joint", "reweighted", "consistency"))
    assert output.total.item() == pytest.approx(2 * (alpha * joint + (1 - alpha) * reweighted + 4.0 * consistency))


def test_each_classifier_learns_from_its_own_loss() -> None:
    first, last = (inputs_for(progress=torch.tensor(progress)) for progress in (0.0, 1.0))
    at_first, at_last = (gradients_of(loss_of(inputs).total, inputs) for inputs in (first, last))
    assert not at_first["classifier.weight"].any()
    assert at_first["head.classifier.weight"].any()
    assert at_last["classifier.weight"].any()
    assert not at_last["head.classifier.weight"].any()


def test_progress_is_read_from_the_device_as_it_is_then() -> None:
    """A captured step sees another value at the same address."""
    inputs = inputs_for(progress=torch.tensor(0.0))
    before = loss_of(inputs).total.item()
    inputs.progress.fill_(0.9)
    assert loss_of(inputs).total.item() != before
    assert loss_of(inputs).total.item() == loss_of(inputs_for(progress=torch.tensor(0.9))).total.item()


# ---- weights of the classes


def test_class_weights_by_hand() -> None:
    counts_K = torch.tensor([8, 4, 1])
    torch.testing.assert_close(class_weights(counts_K, 1.0), 3 * torch.tensor([1.0, 2.0, 8.0]) / 11)
    torch.testing.assert_close(class_weights(counts_K, 0.0), torch.ones(3))
    torch.testing.assert_close(class_weights(torch.tensor([7, 7]), 1.2), torch.ones(2))


@given(counts=st.lists(st.integers(0, 100_000), min_size=1, max_size=50).filter(any), exponent=st.floats(0, 3))
def test_class_weights_have_mean_one_over_the_classes_with_images(counts: list[int], exponent: float) -> None:
    counts_K = torch.tensor(counts)
    weights_K = class_weights(counts_K, exponent)
    assert weights_K[counts_K > 0].mean().item() == pytest.approx(1, rel=1e-4)
    assert not weights_K[counts_K == 0].any()


def test_equal_counts_weigh_no_class_more() -> None:
    inputs = inputs_for()
    inputs.heads.method_head.classifier.load_state_dict(inputs.heads.classifier.state_dict())  # type: ignore[attr-defined,union-attr]
    balanced, tailed = (loss_of(inputs, counts).terms for counts in ((9, 9, 9, 9), COUNTS))
    torch.testing.assert_close(balanced["joint"], balanced["reweighted"])
    assert abs(tailed["joint"] - tailed["reweighted"]) > 0.1


# ---- what it depends on


def test_the_source_view_has_no_part() -> None:
    inputs = inputs_for()
    gradient_VD = gradients_of(loss_of(inputs).total, inputs)["features"]
    assert not gradient_VD[:5].any()
    assert gradient_VD[5:].abs().sum(1).all()


def test_the_order_of_the_images_does_not_matter() -> None:
    inputs, order = inputs_for(), torch.tensor([3, 0, 4, 1, 2])
    views = [MixedTargets(view.labels_B[order], view.partner_labels_B[order], view.lam) for view in (inputs.mixup, inputs.cutmix)]
    features_VD = torch.cat([view[order] for view in inputs.features_VD.chunk(3)])
    permuted = inputs_for(features_VD=features_VD, mixup=views[0], cutmix=views[1])
    torch.testing.assert_close(loss_of(permuted).total, loss_of(inputs).total)


def test_views_that_predict_each_other_reach_the_floor() -> None:
    inputs = inputs_for()
    head: Any = inputs.heads.method_head
    nn.init.eye_(head.predictor.weight)
    nn.init.zeros_(head.predictor.bias)
    nn.init.zeros_(head.projector.bias)
    view_BD = inputs.features_VD[:5]
    # Of other lengths: only directions count.
    output = loss_of(inputs_for(features_VD=torch.cat([view_BD, view_BD, 3 * view_BD]), heads=inputs.heads))
    floor = build_loss(CONFIG, torch.tensor(COUNTS)).floors(4)["consistency"]
    assert output.terms["consistency"].item() == pytest.approx(floor) == -1.0


# ---- safety


@pytest.mark.parametrize("num_classes", [10, 8142])
@pytest.mark.parametrize(("scale", "autocast"), [(1.0, False), (1e4, False), (1e4, True)])
def test_stays_finite(num_classes: int, scale: float, autocast: bool) -> None:
    inputs = inputs_for(num_classes, dtype=torch.float32)
    scaled = inputs_for(num_classes, dtype=torch.float32, features_VD=(scale * inputs.features_VD.detach()).requires_grad_())
    counts = tuple(1 + 1000 // (k + 1) for k in range(num_classes))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = loss_of(scaled, counts)
    assert output.total.dtype == torch.float32
    assert math.isfinite(output.total.item())
    assert all(gradient.isfinite().all() for gradient in gradients_of(output.total, scaled).values())


def test_never_asks_the_host() -> None:
    """Tensors of the meta device have no values: reading one, or a shape that depends on values, raises."""
    with torch.device("meta"):
        labels_B, lam = torch.zeros(5, dtype=torch.int64), torch.tensor(0.3)
        targets = MixedTargets(labels_B, labels_B, lam)
        heads = SimpleNamespace(classifier=build_classifier("linear", 6, 4), method_head=GLMCHead(6, 4))
        features_VD = torch.empty(15, 6).requires_grad_()
        changes: dict[str, Any] = {"features_VD": features_VD, "mixup": targets, "cutmix": targets, "heads": heads, "progress": lam}
        counts_K = torch.ones(4, dtype=torch.int64)
    build_loss(CONFIG, counts_K)(inputs_for(**changes)).total.backward()
    assert features_VD.grad is not None


@pytest.mark.parametrize(("feature_dim", "projection_dim"), [(64, 128), (256, 128), (512, 256), (2048, 256)])
def test_the_heads_are_of_the_authors_sizes(feature_dim: int, projection_dim: int) -> None:
    with torch.device("meta"):
        output = GLMCHead(feature_dim, 7)(torch.empty(2, feature_dim))
    assert [tuple(values.shape) for values in output] == [(2, 7), (2, projection_dim), (2, projection_dim)]
