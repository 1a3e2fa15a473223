"""Definitions, numerical safety and the seam that every loss goes through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from bce3s.config import LossConfig
from bce3s.losses import LOSSES, Share, build_loss
from bce3s.losses.ce import mixed_ce
from bce3s.losses.terms import contrastive_bce, mixed_bce, source_bce, uniform_bce
from pipelines.types import ConfigError
from tests.bce3s.losses.cases import COUNTS, dense, heads_for, host_reads, remember, run, targets_for


@pytest.mark.parametrize("name", LOSSES)
class TestEveryLoss:
    @pytest.mark.parametrize("K", [10, 8142])
    def test_runs_at_ten_and_at_8142_classes(self, name: str, K: int) -> None:
        output, features = run(name, K)
        output.total.backward()
        assert torch.isfinite(output.total)
        assert features.grad is not None
        assert torch.isfinite(features.grad).all()
        assert "joint" in output.terms

    @pytest.mark.parametrize("autocast", [False, True])
    def test_huge_features_stay_finite(self, name: str, autocast: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output, features = run(name, scale=1e4)
        output.total.backward()
        assert torch.isfinite(output.total)
        assert features.grad is not None
        assert torch.isfinite(features.grad).all()

    def test_terms_are_detached_scalars(self, name: str) -> None:
        output, _ = run(name)
        assert output.total.requires_grad
        assert all(term.shape == () and not term.requires_grad for term in output.terms.values())

    def test_a_step_reads_nothing_back_from_the_device(self, name: str) -> None:
        heads = heads_for(50, name=name)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            output, _ = run(name, 50, heads=heads)
            output.total.backward()
        assert host_reads(profile) == []

    def test_classes_without_images_give_no_nan(self, name: str) -> None:
        for epoch in (1, 9):
            output, features = run(name, len(COUNTS), counts=COUNTS, epoch=epoch)
            output.total.backward()
            assert torch.isfinite(output.total)
            assert features.grad is not None
            assert torch.isfinite(features.grad).all()

    def test_bf16_autocast_stays_near_float32(self, name: str) -> None:
        exact, _ = run(name, 50)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, _ = run(name, 50)
        assert output.total.dtype == torch.float32
        torch.testing.assert_close(output.total, exact.total, rtol=0.02, atol=0.0)

    def test_is_deterministic_given_its_key(self, name: str) -> None:
        assert run(name)[0].total.item() == run(name)[0].total.item()


def test_unknown_loss_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=f"unknown method 'madeup'; known: {', '.join(LOSSES)}"):
        build_loss(LossConfig(name="madeup"), torch.ones(3, dtype=torch.int64))


mixes = st.tuples(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.lists(st.integers(0, 6), min_size=5, max_size=5),
    st.sampled_from([0.0, 0.25, 0.7, 1.0]),
)


@given(mix=mixes, seed=st.integers(0, 1000))
def test_mixed_bce_equals_its_definition_over_a_dense_target(mix: tuple[list[int], list[int], float], seed: int) -> None:
    labels, partners, lam = mix
    z = torch.randn(len(labels), 7, generator=torch.Generator().manual_seed(seed)) * 3
    targets = targets_for(labels, partners[: len(labels)], lam)
    t = dense(targets, 7)
    expected = (t * functional.softplus(-z) + (t == 0) * functional.softplus(z)).sum(1).mean()
    torch.testing.assert_close(mixed_bce(z, targets), expected)


@given(mix=mixes, seed=st.integers(0, 1000))
def test_mixed_ce_equals_torch_cross_entropy_with_probabilities(mix: tuple[list[int], list[int], float], seed: int) -> None:
    labels, partners, lam = mix
    z = torch.randn(len(labels), 7, generator=torch.Generator().manual_seed(seed)) * 3
    targets = targets_for(labels, partners[: len(labels)], lam)
    torch.testing.assert_close(mixed_ce(z, targets), functional.cross_entropy(z, dense(targets, 7)))


def test_mixed_bce_is_not_soft_target_bce() -> None:
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    targets = targets_for([0, 1, 2, 3], [1, 2, 3, 4], 0.4)
    soft = functional.binary_cross_entropy_with_logits(z, dense(targets, 5), reduction="sum") / 4
    assert abs(mixed_bce(z, targets) - soft) > 0.1


def test_source_bce_over_all_classes_is_one_hot_bce() -> None:
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 4, 4, 1])
    expected = functional.binary_cross_entropy_with_logits(z, functional.one_hot(labels, 5).float(), reduction="sum") / 4
    torch.testing.assert_close(source_bce(z, labels, torch.ones(5, dtype=torch.bool)), expected)


def test_the_class_subset_size_is_reported() -> None:
    output, _ = run("bce3s", K=50)
    assert output.terms["class_subset_size"] == 20


def test_uniform_term_is_least_at_the_simplex() -> None:
    K = 6
    simplex = torch.eye(K) - 1 / K
    simplex = functional.normalize(simplex, dim=1)
    floor = functional.softplus(torch.tensor(-1.0)) + (K - 1) * functional.softplus(torch.tensor(-1.0 / (K - 1)))
    torch.testing.assert_close(uniform_bce(simplex), floor)
    for seed in range(5):
        rows = functional.normalize(torch.randn(K, K, generator=torch.Generator().manual_seed(seed)), dim=1)
        assert uniform_bce(rows) > floor


def test_classes_without_memory_are_left_out_of_the_contrastive_term() -> None:
    rows = functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    projections = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    filled = torch.tensor([True, True, False, True, False])
    targets = targets_for([0, 2], [1, 1], 0.4)
    found = contrastive_bce(projections, rows, targets, 0.5, 64.0, filled)
    s, t = functional.normalize(projections, dim=1) @ rows.T / 0.5, dense(targets, 5)
    terms = t * functional.softplus(-s) + (t == 0) * functional.softplus(s)
    torch.testing.assert_close(found, terms[:, filled].sum(1).mean())


def test_contrastive_term_waits_for_the_warmup_and_fills_the_memory_meanwhile() -> None:
    heads = heads_for(10)
    first, _ = run("bce3s", epoch=0, heads=heads)
    assert "contrastive" not in first.terms
    remember(heads, first)
    second, _ = run("bce3s", epoch=1, heads=heads)
    assert "contrastive" in second.terms


def test_contrastive_term_reads_the_memory_of_the_step_before() -> None:
    heads = heads_for(10)
    remember(heads, run("bce3s", epoch=0, heads=heads)[0])
    with torch.no_grad():
        heads.feature_memory.rows_KP.mul_(-1)
    before = heads.feature_memory.rows_KP.clone()
    flipped, _ = run("bce3s", heads=heads)
    assert torch.equal(heads.feature_memory.rows_KP, before)
    remember(heads, flipped)
    # The memory now holds this step's own projections; reading it again gives another value.
    again, _ = run("bce3s", heads=heads)
    assert abs(flipped.terms["contrastive"] - again.terms["contrastive"]) > 1e-3


@pytest.mark.parametrize("samples", [0, 6])
def test_the_mean_over_shares_of_one_batch_is_the_loss_of_the_whole(samples: int) -> None:
    whole, whole_features = run("bce3s", uniform_samples=samples)
    parts = [run("bce3s", share=Share(i, 4, 0.25), uniform_samples=samples)[0] for i in range(4)]
    torch.testing.assert_close(torch.stack([part.total for part in parts]).mean(), whole.total)
    torch.testing.assert_close(torch.stack([part.terms["uniform"] for part in parts]).mean(), whole.terms["uniform"])
    whole.total.backward()
    assert whole_features.grad is not None


def test_a_share_without_a_part_in_the_uniform_term_still_has_every_gradient() -> None:
    """Ranks wait for each other's gradients: none may be missing."""
    heads = heads_for(10)
    output, _ = run("bce3s", heads=heads, share=Share(3, 4, 0.25), epoch=0)
    assert output.terms["uniform"] == 0
    output.total.backward()
    assert heads.classifier.weight.grad is not None


def test_the_estimate_of_the_uniform_term_is_near_the_term() -> None:
    exact, estimate = (run("bce3s", K=400, uniform_samples=samples)[0].terms["uniform"] for samples in (0, 100))
    assert exact != estimate
    assert abs(estimate / exact - 1) < 0.02


def test_bce_is_the_joint_term_of_bce3s() -> None:
    alone, _ = run("bce", K=50)
    together, _ = run("bce3s", K=50)
    assert alone.projections_BP is None
    assert set(alone.terms) == {"joint", "class_subset_size"}
    torch.testing.assert_close(alone.total.detach(), together.terms["joint"])


@pytest.mark.cuda
@pytest.mark.parametrize("samples", [0, 20])
def test_cuda_gives_the_loss_of_the_cpu(samples: int) -> None:
    """Class subset and sample come from the key alone, so they are the same on both."""
    found = []
    for device in ("cpu", "cuda"):
        output, features = run("bce3s", 50, epoch=0, heads=heads_for(50, device=device), device=device, uniform_samples=samples)
        output.total.backward()
        assert features.grad is not None
        found.append((output.total.detach().cpu(), features.grad.cpu(), output.terms["class_subset_size"].cpu()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
