"""The heads against the authors' numbers, and the memory against a plain loop."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bce3s.heads import CosineClassifier, FeatureMemory, LinearClassifier, NormalizedClassifier, Projector, build_classifier

ORACLE_DIR = Path(__file__).resolve().parents[4] / "shared" / "oracle"


@pytest.fixture(params=["loss_all_classes", "loss_class_subset"])
def oracle(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    path = ORACLE_DIR / f"{request.param}.npz"
    if not path.is_file():
        pytest.skip(f"the reference numbers are not beside this checkout ({path.name})")
    with np.load(path) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}


def test_logits_match_the_reference(oracle: dict[str, Tensor]) -> None:
    num_classes, feature_dim = oracle["classifier_weight"].shape
    classifier = NormalizedClassifier(feature_dim, num_classes).double()
    classifier.load_state_dict({"weight": oracle["classifier_weight"], "bias": oracle["classifier_bias"]})
    torch.testing.assert_close(classifier(oracle["features_source"]), oracle["logits_source"], rtol=1e-9, atol=1e-9)


def test_projector_and_memory_match_the_reference(oracle: dict[str, Tensor]) -> None:
    projection_dim, feature_dim = oracle["proj1_weight"].shape
    projector = Projector(feature_dim, projection_dim).double()
    for layer, name in ((projector.hidden, "proj0"), (projector.output, "proj1")):
        layer.load_state_dict({"weight": oracle[f"{name}_weight"], "bias": oracle[f"{name}_bias"]})
    memory = FeatureMemory(len(oracle["memory_before"]), projection_dim).double()
    memory.rows_KP.copy_(oracle["memory_before"])
    # The reference rounds what it writes to float32, as our memory does outside this test; rows it leaves alone are float64.
    memory.update(projector(oracle["features_source"]).float(), oracle["labels"])
    assert len(set(oracle["labels"].tolist())) < len(oracle["labels"])
    assert torch.equal(memory.rows_KP[~memory.filled_K], oracle["memory_after"][~memory.filled_K])
    torch.testing.assert_close(memory.rows_KP, oracle["memory_after"], rtol=2e-7, atol=1e-12)


def test_classifier_starts_as_a_linear_layer() -> None:
    torch.manual_seed(3)
    classifier = NormalizedClassifier(7, 5)
    torch.manual_seed(3)
    linear = nn.Linear(7, 5)
    assert list(classifier.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(classifier.weight, linear.weight, rtol=0, atol=0)
    torch.testing.assert_close(classifier.bias, linear.bias, rtol=0, atol=0)


def test_logits_ignore_the_length_of_rows_but_not_of_features() -> None:
    torch.manual_seed(0)
    classifier = NormalizedClassifier(6, 4, bias=False)
    features_BD = torch.randn(3, 6)
    before_BK = classifier(features_BD)
    with torch.no_grad():
        classifier.weight.mul_(torch.tensor([[0.5], [1.0], [2.0], [30.0]]))
    torch.testing.assert_close(classifier(features_BD), before_BK)
    torch.testing.assert_close(classifier(2 * features_BD), 2 * before_BK)
    torch.testing.assert_close(classifier.normalized_weight().norm(dim=1), torch.ones(4))


def test_a_zero_row_has_finite_logits_and_gradients() -> None:
    classifier = NormalizedClassifier(3, 2)
    nn.init.zeros_(classifier.weight)
    classifier(torch.ones(1, 3)).sum().backward()
    assert classifier.weight.grad is not None
    assert classifier.weight.grad.isfinite().all()


def logits_by_definition(classifier: NormalizedClassifier, features_BD: Tensor) -> Tensor:
    """x·w + b, x·w/‖w‖ + b or s·x·w/(‖x‖‖w‖), a number at a time."""
    logits = []
    for x in features_BD:
        for k, w in enumerate(classifier.weight):
            z = sum(a * b for a, b in zip(x, w, strict=True))
            z = z if type(classifier) is LinearClassifier else z / w.square().sum().sqrt()
            bias = 0 if isinstance(classifier, CosineClassifier) else classifier.bias[k]
            logits.append(30 * z / x.square().sum().sqrt() if isinstance(classifier, CosineClassifier) else z + bias)
    return torch.stack(logits).reshape(len(features_BD), -1)


@pytest.mark.parametrize("kind", ["normalized", "linear", "cosine"])
def test_logits_and_gradients_of_each_classifier_are_those_of_its_definition(kind: str) -> None:
    torch.manual_seed(1)
    classifier = build_classifier(kind, 6, 4).double()
    features_BD = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    found, expected = classifier(features_BD), logits_by_definition(classifier, features_BD)
    torch.testing.assert_close(found, expected)
    wanted = [features_BD, *classifier.parameters()]
    slopes_BK = torch.randn(3, 4, dtype=torch.float64)
    gradients = (torch.autograd.grad((logits * slopes_BK).sum(), wanted) for logits in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_cosine_classifier_ignores_lengths_and_has_no_biases() -> None:
    torch.manual_seed(0)
    classifier, features_BD = build_classifier("cosine", 6, 4, scale=16.0), torch.randn(3, 6)
    before_BK = classifier(features_BD)
    assert list(classifier.state_dict()) == ["weight"]
    with torch.no_grad():
        classifier.weight.mul_(7)
    torch.testing.assert_close(classifier(5 * features_BD), before_BK)
    assert before_BK.abs().max() <= 16
    torch.testing.assert_close(classifier(classifier.weight).diagonal(), torch.full((4,), 16.0))


@pytest.mark.parametrize("kind", ["normalized", "linear", "cosine"])
def test_margins_know_the_unit_of_the_logits(kind: str) -> None:
    assert build_classifier(kind, 6, 4, scale=20.0).scale == (20.0 if kind == "cosine" else 1.0)


@pytest.mark.parametrize("kind", ["normalized", "linear"])
@pytest.mark.parametrize("num_classes", [2, 100])
def test_a_prior_bias_gives_each_sigmoid_the_prior_of_one_class(kind: str, num_classes: int) -> None:
    classifier = build_classifier(kind, 6, num_classes, bias_prior=True)
    torch.testing.assert_close(classifier(torch.zeros(1, 6)).sigmoid()[0], torch.full((num_classes,), 1 / num_classes))
    torch.manual_seed(3)
    prior = build_classifier(kind, 6, num_classes, bias_prior=True)
    torch.manual_seed(3)
    plain = build_classifier(kind, 6, num_classes)
    assert torch.equal(prior.weight, plain.weight)
    assert plain.bias.abs().max() <= 1 / math.sqrt(6)  # as nn.Linear starts


def test_one_class_alone_has_a_finite_prior() -> None:
    assert build_classifier("linear", 6, 1, bias_prior=True).bias.tolist() == [0.0]


def looped_update(rows_KP: Tensor, filled_K: Tensor, projections_BP: Tensor, labels_B: Tensor) -> None:
    for projection_P, label in zip(projections_BP, labels_B.tolist(), strict=True):
        rows_KP[label] = projection_P
        filled_K[label] = True


@given(labels=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_memory_updates_as_a_loop_over_samples_does(labels: list[list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    memory = FeatureMemory(6, 3)
    rows_KP, filled_K = memory.rows_KP.clone(), memory.filled_K.clone()
    for batch in labels:
        projections_BP = torch.randn(len(batch), 3, generator=generator)
        memory.update(projections_BP, torch.tensor(batch))
        looped_update(rows_KP, filled_K, projections_BP, torch.tensor(batch))
    assert torch.equal(memory.rows_KP, rows_KP)
    assert torch.equal(memory.filled_K, filled_K)


def test_memory_starts_empty_and_normalises_without_nan() -> None:
    memory = FeatureMemory(4, 3)
    assert not memory.filled_K.any()
    memory.update(torch.tensor([[3.0, 0.0, 4.0]]), torch.tensor([2]))
    assert memory.filled_K.tolist() == [False, False, True, False]
    torch.testing.assert_close(memory.normalized()[2], torch.tensor([0.6, 0.0, 0.8]))
    assert memory.normalized().isfinite().all()
    torch.testing.assert_close(memory.normalized(eps=10.0)[2], torch.tensor([0.3, 0.0, 0.4]))


def test_memory_stays_float32_and_detached_under_autocast() -> None:
    projector, memory = Projector(5, 3), FeatureMemory(4, 3)
    labels_B = torch.tensor([1, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projections_BP = projector(torch.randn(2, 5))
        memory.update(projections_BP, labels_B)
    assert projections_BP.dtype == torch.bfloat16
    assert memory.rows_KP.dtype == torch.float32
    assert not memory.rows_KP.requires_grad
    torch.testing.assert_close(memory.rows_KP[labels_B], projections_BP.float(), rtol=0, atol=0)


def test_memory_never_asks_the_host() -> None:
    # Tensors of the meta device have no values: reading one, or a shape that depends on values, raises.
    memory = FeatureMemory(6, 3).to("meta")
    memory.update(torch.empty(4, 3, device="meta"), torch.empty(4, dtype=torch.int64, device="meta"))


@pytest.mark.cuda
def test_memory_on_cuda_neither_waits_nor_depends_on_the_order_of_threads() -> None:
    projections_BP, labels_B = torch.randn(512, 16), torch.randint(0, 5, (512,))
    expected, memory = FeatureMemory(8, 16), FeatureMemory(8, 16).cuda()
    expected.update(projections_BP, labels_B)
    on_device = projections_BP.cuda(), labels_B.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        memory.update(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(memory.rows_KP.cpu(), expected.rows_KP)


def test_memory_update_compiles_without_a_graph_break_and_keeps_its_buffers() -> None:
    memory = FeatureMemory(6, 3)
    address = memory.rows_KP.data_ptr()
    traced = torch.compile(memory.update, fullgraph=True, backend="eager")
    traced(torch.arange(9.0).reshape(3, 3), torch.tensor([4, 1, 4]))
    assert memory.rows_KP[[1, 4]].tolist() == [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]
    assert memory.rows_KP.data_ptr() == address


def test_update_before_backward_leaves_the_gradients_of_normalized_rows_alone() -> None:
    torch.manual_seed(0)
    memory = FeatureMemory(4, 3)
    memory.update(torch.randn(4, 3), torch.arange(4))
    projections_BP = torch.randn(2, 3, requires_grad=True)
    similarity_BK = F.normalize(projections_BP, dim=1) @ memory.normalized().T
    (expected,) = torch.autograd.grad(similarity_BK.square().sum(), projections_BP, retain_graph=True)
    memory.update(torch.randn(4, 3), torch.arange(4))
    (after,) = torch.autograd.grad(similarity_BK.square().sum(), projections_BP)
    torch.testing.assert_close(after, expected, rtol=0, atol=0)


def test_update_before_backward_of_a_saved_mask_is_refused() -> None:
    memory = FeatureMemory(2, 3)
    logits_K = torch.ones(2, requires_grad=True)
    masked = torch.where(memory.filled_K, logits_K, 0.0).sum()
    memory.update(torch.ones(1, 3), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(masked)
