"""The ablation grid: each term as BCE, as CE or off, in any combination."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bce3s.config import LossConfig
from bce3s.losses import LossOutput, MixedTargets, Phase, Share, build_loss
from bce3s.losses.terms import contrastive_ce_rows, uniform_bce, uniform_ce
from tests.bce3s.losses.cases import COUNTS, heads_for, host_reads, on_logits, random_batch, run
from tests.bce3s.losses.test_fused_bce import LargeMemory

GRID = list(itertools.product(("bce", "ce"), ("bce", "ce", "off"), ("bce", "ce", "off")))
# Those without the [K, K] matrix of a CE uniform term, which takes seconds at 8142 classes.
LARGE = [("bce", "ce", "off"), ("ce", "bce", "bce")]
GRID_OF_LARGE = [kinds if kinds in LARGE else pytest.param(*kinds, marks=pytest.mark.slow) for kinds in GRID]


def filled_heads(K: int) -> Any:
    """Heads whose memory holds all classes but the last."""
    heads = heads_for(K)
    heads.feature_memory.update(torch.randn(K - 1, 8, generator=torch.Generator().manual_seed(2)), torch.arange(K - 1))
    return heads


def run_grid(joint: str, contrastive: str, uniform: str, K: int = 10, heads: Any = None, **settings: Any) -> tuple[LossOutput, Tensor]:
    return run("tsl", K, heads=heads or filled_heads(K), joint=joint, contrastive=contrastive, uniform=uniform, **settings)


def gradients(output: LossOutput, features: Tensor, heads: Any) -> list[Tensor]:
    parameters = [features, *heads.classifier.parameters(), *heads.projector.parameters()]
    return [each for each in torch.autograd.grad(output.total, parameters, allow_unused=True) if each is not None]


@pytest.mark.parametrize(("joint", "contrastive", "uniform"), GRID)
class TestTheGrid:
    def test_total_is_the_weighted_sum_of_the_terms_that_are_on(self, joint: str, contrastive: str, uniform: str) -> None:
        output, _ = run_grid(joint, contrastive, uniform, contrastive_weight=0.3, uniform_weight=0.7)
        kinds = {"joint": (joint, 1.0), "contrastive": (contrastive, 0.3), "uniform": (uniform, 0.7)}
        on = {name: weight for name, (kind, weight) in kinds.items() if kind != "off"}
        assert set(output.terms) - {"class_subset_size"} == set(on)
        assert ("class_subset_size" in output.terms) == (joint == "bce")
        torch.testing.assert_close(
            output.total.detach(), sum((weight * output.terms[name] for name, weight in on.items()), torch.zeros(()))
        )

    def test_every_part_that_is_on_has_a_finite_gradient(self, joint: str, contrastive: str, uniform: str) -> None:
        heads = filled_heads(10)
        output, features = run_grid(joint, contrastive, uniform, heads=heads)
        found = gradients(output, features, heads)
        assert len(found) == 3 + 4 * (contrastive != "off")
        assert all(gradient.isfinite().all() and gradient.any() for gradient in found)

    def test_only_a_contrastive_term_writes_the_memory_and_trains_the_projector(self, joint: str, contrastive: str, uniform: str) -> None:
        output, _ = run_grid(joint, contrastive, uniform)
        assert (output.projections_BP is None) == (contrastive == "off")
        loss = build_loss(LossConfig(name="tsl", joint=joint, contrastive=contrastive, uniform=uniform), torch.ones(10, dtype=torch.int64))
        on, warm = (Phase("full", False),) * 2 if contrastive == "off" else (Phase("full", True), Phase("warm-up", False))
        assert (loss.phase(1, 10), loss.phase(0, 10)) == (on, warm)

    def test_reads_nothing_back_and_is_a_function_of_its_key(self, joint: str, contrastive: str, uniform: str) -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            first, _ = run_grid(joint, contrastive, uniform, uniform_samples=4)
            first.total.backward()
        assert host_reads(profile) == []
        assert torch.equal(first.total, run_grid(joint, contrastive, uniform, uniform_samples=4)[0].total)

    @pytest.mark.parametrize("samples", [0, 4])
    def test_shares_of_one_batch_sum_to_the_whole(self, joint: str, contrastive: str, uniform: str, samples: int) -> None:
        whole, _ = run_grid(joint, contrastive, uniform, uniform_samples=samples)
        parts = [run_grid(joint, contrastive, uniform, uniform_samples=samples, share=Share(i, 4, 0.25))[0] for i in range(4)]
        torch.testing.assert_close(torch.stack([part.total for part in parts]).mean(), whole.total)


@pytest.mark.parametrize(("joint", "contrastive", "uniform"), GRID_OF_LARGE)
def test_8142_classes_have_finite_gradients(joint: str, contrastive: str, uniform: str) -> None:
    heads = filled_heads(8142)
    output, features = run_grid(joint, contrastive, uniform, K=8142, heads=heads)
    assert all(gradient.isfinite().all() for gradient in gradients(output, features, heads))


@pytest.mark.parametrize(
    ("name", "kinds"), [("bce3s", ("bce", "bce", "bce")), ("bce", ("bce", "off", "off")), ("ce", ("ce", "off", "off"))], ids=str
)
def test_the_named_methods_are_points_of_the_grid_bit_for_bit(name: str, kinds: tuple[str, str, str]) -> None:
    one, other = filled_heads(50), filled_heads(50)
    (named, named_features), (point, point_features) = run(name, 50, heads=one), run_grid(*kinds, K=50, heads=other)
    assert torch.equal(named.total, point.total)
    for a, b in zip(gradients(named, named_features, one), gradients(point, point_features, other), strict=True):
        assert torch.equal(a, b)


def test_the_named_methods_ignore_the_kinds() -> None:
    for name in ("bce3s", "bce", "ce"):
        plain, _ = run(name, heads=filled_heads(10))
        told, _ = run(name, heads=filled_heads(10), joint="ce", contrastive="off", uniform="ce")
        assert torch.equal(plain.total, told.total)


def test_contrastive_ce_is_the_cross_entropy_over_the_filled_classes() -> None:
    logits, targets = random_batch(K=5, B=4)
    logits, filled = logits[:4], torch.tensor([True, True, False, True, True])
    targets = MixedTargets(torch.tensor([0, 2, 3, 2]), torch.tensor([0, 1, 2, 2]), targets.lam)
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = []
    for z, label, partner in zip(leaf, targets.labels_B.tolist(), targets.partner_labels_B.tolist(), strict=True):
        log_sum = torch.stack([z[k].exp() for k in (0, 1, 3, 4)]).sum().log()
        parts = [weight * (log_sum - z[k]) for k, weight in ((label, 0.3), (partner, 0.7)) if k != 2]
        expected.append(sum(parts, 0 * z[0]))
    found = contrastive_ce_rows(other, targets, filled)
    torch.testing.assert_close(found, torch.stack(expected))
    slopes = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(found, other, slopes)[0], torch.autograd.grad(torch.stack(expected), leaf, slopes)[0])


def test_contrastive_ce_against_an_empty_memory_is_nothing() -> None:
    logits, targets = random_batch(K=5, B=4)
    leaf = logits[:4].requires_grad_()
    losses = contrastive_ce_rows(leaf, targets, torch.zeros(5, dtype=torch.bool))
    assert losses.tolist() == [0.0] * 4
    assert not torch.autograd.grad(losses.sum(), leaf)[0].any()


def test_the_contrastive_term_is_the_sum_over_both_mixed_views_at_its_temperature() -> None:
    heads = filled_heads(10)
    heads.feature_memory.update(torch.ones(1, 8), torch.tensor([9]))
    output, features = run_grid("ce", "ce", "off", heads=heads, temperature=0.2)
    s = functional.normalize(heads.projector(features[6:]), dim=1) @ heads.feature_memory.normalized().T / 0.2
    generator = torch.Generator().manual_seed(1)
    torch.randn(18, 16, generator=generator)
    labels, partners = (torch.randint(0, 10, (6,), generator=generator) for _ in range(2))
    expected = sum(0.3 * functional.cross_entropy(view, labels) + 0.7 * functional.cross_entropy(view, partners) for view in s.chunk(2))
    torch.testing.assert_close(output.terms["contrastive"], expected.detach())  # type: ignore[union-attr]


def rows(K: int, D: int, seed: int = 0) -> Tensor:
    return functional.normalize(torch.randn(K, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def test_uniform_ce_is_its_definition() -> None:
    leaf, other = rows(7, 4).requires_grad_(), rows(7, 4).requires_grad_()
    expected = sum(-(leaf[k].dot(leaf[k]).exp() / sum(leaf[k].dot(leaf[j]).exp() for j in range(7))).log() for k in range(7)) / 7
    found = uniform_ce(other)
    torch.testing.assert_close(found, torch.as_tensor(expected))
    torch.testing.assert_close(torch.autograd.grad(found, other)[0], torch.autograd.grad(torch.as_tensor(expected), leaf)[0])


def test_uniform_ce_of_two_opposite_rows_by_hand() -> None:
    assert uniform_ce(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(math.log(1 + math.exp(-2.0)))


def test_the_estimate_of_uniform_ce_is_unbiased_and_its_shares_add_up() -> None:
    weight = rows(5, 3)
    draws = [torch.tensor(pair) for pair in itertools.combinations(range(5), 2)]
    torch.testing.assert_close(torch.stack([uniform_ce(weight, drawn_R=drawn) for drawn in draws]).mean(), uniform_ce(weight))
    weights = (0.5, 0.3, 0.2)
    parts = [uniform_ce(weight, Share(index, 3, of_share), torch.tensor([4, 0])) * of_share for index, of_share in enumerate(weights)]
    torch.testing.assert_close(torch.stack(parts).sum(), uniform_ce(weight, drawn_R=torch.tensor([4, 0])))


@pytest.mark.parametrize(("kind", "term"), [("bce", uniform_bce), ("ce", uniform_ce)])
@pytest.mark.parametrize("K", [2, 6, 300])
def test_the_reported_floor_is_the_least_value_of_the_uniform_term(kind: str, term: Any, K: int) -> None:
    floor = build_loss(LossConfig(name="tsl", uniform=kind), torch.ones(K, dtype=torch.int64)).floors(K)["uniform"]
    simplex = functional.normalize(torch.eye(K, dtype=torch.float64) - 1 / K, dim=1)
    assert term(simplex).item() == pytest.approx(floor)
    assert all(term(rows(K, K, seed)) > floor for seed in range(5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sigmoid_adjustment_adds_tau_log_k_pi_to_every_logit(dtype: torch.dtype) -> None:
    logits, targets = random_batch(dtype=torch.float64)
    images = [max(count, 1) for count in COUNTS]
    shift = torch.tensor([1.5 * math.log(6 * count / sum(images)) for count in images])
    settings: dict[str, Any] = {"negative_ratio": 0.5}
    found = on_logits("bce", logits.to(dtype), targets, COUNTS, sigmoid_adjustment=1.5, **settings)
    expected = on_logits("bce", logits.to(dtype) + shift.to(dtype), targets, COUNTS, **settings)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found[0], on_logits("bce", logits.to(dtype), targets, COUNTS, **settings)[0])


@pytest.mark.parametrize("name", ["bce", "bce3s", "tsl"])
def test_sigmoid_adjustment_is_off_at_0_and_where_all_classes_are_alike(name: str) -> None:
    plain, _ = run(name, 6, counts=COUNTS)
    assert torch.equal(plain.total, run(name, 6, counts=COUNTS, sigmoid_adjustment=0.0)[0].total)
    assert torch.equal(plain.total, run(name, 6, counts=[9] * 6, sigmoid_adjustment=2.0)[0].total)
    assert not torch.allclose(plain.total, run(name, 6, counts=COUNTS, sigmoid_adjustment=2.0)[0].total)


def test_sigmoid_adjustment_makes_no_further_array_of_logits() -> None:
    sizes = []
    for tau in (0.0, 1.0):
        heads = heads_for(40)
        with LargeMemory(18 * 40) as memory:
            output, _ = run("bce", 40, heads=heads, counts=list(range(1, 41)), sigmoid_adjustment=tau)
            output.total.backward()
        sizes.append(len(memory.addresses))
    assert sizes[0] == sizes[1]
