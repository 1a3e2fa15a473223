"""The fused BCE is its reference, value and gradient, row by row; what it overwrites cannot be used by mistake."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bce3s.losses import MixedTargets
from bce3s.losses.fused_bce import _reference_rows, fused_bce
from pipelines.augment import shares

ROOT = Path(__file__).resolve().parents[3]
# Of the logits: in bfloat16 both sides round each gradient once, from values that are a few units of float32 apart.
CLOSE = {torch.float32: {"rtol": 2e-6, "atol": 2e-6}, torch.bfloat16: {"rtol": 8e-3, "atol": 1e-6}}


def draw(num_rows: int, num_classes: int, seed: int = 0, scale: float = 5.0) -> tuple[Tensor, MixedTargets, Tensor]:
    """Logits, targets with both labels equal in some rows and λ at both ends in others, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_rows, num_classes, generator=generator)
    labels, partners = torch.randint(0, num_classes, (2, num_rows), generator=generator)
    partners[::3] = labels[::3]
    lam = torch.rand(num_rows, generator=generator)
    lam[1::4], lam[2::4] = 0.0, 1.0
    return logits, MixedTargets(labels, partners, lam), torch.rand(num_classes, generator=generator) < 0.6


def slopes_for(num_rows: int) -> Tensor:
    return torch.linspace(-1.0, 2.0, num_rows)


def fused(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    losses = fused_bce(leaf * 1, *arguments)  # type: ignore[arg-type]
    losses.backward(slopes_for(len(logits)).to(losses))
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def reference(logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    losses = _reference_rows(leaf, *arguments)  # type: ignore[arg-type]
    losses.backward(slopes_for(len(logits)).to(losses))
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("dtype", CLOSE)
@given(num_rows=st.integers(1, 9), num_classes=st.integers(1, 70), share=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 999))
def test_every_row_has_the_references_loss_and_gradient(
    dtype: torch.dtype, num_rows: int, num_classes: int, share: float, seed: int
) -> None:
    logits, targets, mask = draw(num_rows, num_classes, seed)
    arguments = (logits.to(dtype), targets, mask, int(share * num_rows), 64.0)
    (losses, gradient), (expected_losses, expected_gradient) = fused(*arguments), reference(*arguments)
    assert losses.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(losses, expected_losses, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient, expected_gradient, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("clamp", [0.5, 64.0, 1000.0])
def test_huge_logits_are_clamped_and_lose_their_gradient_beyond(dtype: torch.dtype, clamp: float) -> None:
    edges = [0.0, -0.0, clamp, -clamp, 2 * clamp, -2 * clamp, 90.0, -90.0, 3e38, -3e38, math.inf, -math.inf, 1e-30]
    logits = torch.tensor([edges] * 5).to(dtype)
    targets = MixedTargets(torch.tensor([0, 2, 4, 10, 11]), torch.tensor([1, 3, 5, 6, 6]), torch.tensor(0.3))
    arguments = (logits, targets, torch.ones(len(edges), dtype=torch.bool), 2, clamp)
    for found, expected in zip(fused(*arguments), reference(*arguments), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, **CLOSE[dtype])


@pytest.mark.parametrize("value", [1.0, 10.0, 30.0, 80.0])
def test_a_row_of_tiny_terms_keeps_them(value: float) -> None:
    """log(1 + e) of a tiny e, which float32 would round to 0."""
    losses = fused_bce(torch.full((1, 3), -value), one_row(), torch.tensor([True, True, False]), logit_clamp=100.0)
    expected = math.log1p(math.exp(value)) + math.log1p(math.exp(-value))
    assert losses.item() == pytest.approx(expected, rel=1e-6)
    negatives = fused_bce(torch.full((1, 3), -value), one_row(), torch.tensor([False, True, True]), logit_clamp=100.0)
    assert negatives.item() == pytest.approx(2 * math.log1p(math.exp(-value)), rel=1e-6)


def one_row() -> MixedTargets:
    return MixedTargets(torch.tensor([0]), torch.tensor([0]), torch.tensor(1.0))


@pytest.mark.parametrize("dtype", CLOSE)
def test_a_logit_that_is_no_number_reaches_the_loss(dtype: torch.dtype) -> None:
    logits, targets, mask = draw(4, 40)
    logits[2, 17] = math.nan
    losses = fused_bce(logits.to(dtype), targets, torch.ones_like(mask))
    assert losses.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_run_on_the_reference(dtype: torch.dtype) -> None:
    logits, targets, mask = draw(4, 40)
    arguments = (logits.to(dtype), targets, mask, 2, 64.0)
    for found, expected in zip(fused(*arguments), reference(*arguments), strict=True):
        assert torch.equal(found, expected)


class LargeMemory(TorchDispatchMode):
    """Addresses of the memory of every result with at least `elements`."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.addresses = elements, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.elements:
            self.addresses.add(result.untyped_storage().data_ptr())
        return result


def test_the_gradient_takes_the_memory_of_the_logits_and_nothing_of_their_size_is_made() -> None:
    logits, targets, mask = draw(20, 40)
    made = logits.requires_grad_() * 1
    with LargeMemory(logits.numel()) as fused_memory:
        (gradient,) = torch.autograd.grad(fused_bce(made, targets, mask, 5).sum(), made)
    assert fused_memory.addresses == {made.untyped_storage().data_ptr()} == {gradient.untyped_storage().data_ptr()}
    with LargeMemory(5 * 40) as memory:
        torch.autograd.grad(_reference_rows(logits * 1, targets, mask, 5, 64.0).sum(), logits)
    assert len(memory.addresses) > 3


def test_a_forward_pass_alone_leaves_the_logits() -> None:
    logits, targets, mask = draw(6, 40)
    kept = logits.clone()
    fused_bce(logits, targets, mask)
    assert torch.equal(logits, kept)


def test_a_second_backward_pass_is_refused() -> None:
    logits, targets, mask = draw(6, 40)
    total = fused_bce(logits.requires_grad_() * 1, targets, mask).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs backward once; compute the loss again"):
        total.backward()


def test_another_reader_of_the_logits_is_told_that_they_are_gone() -> None:
    logits, targets, mask = draw(6, 40)
    made = logits.requires_grad_() * 1
    squares = (made**2).sum()
    fused_bce(made, targets, mask).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_a_leaf_is_refused() -> None:
    logits, targets, mask = draw(6, 40)
    with pytest.raises(ValueError, match="not a parameter or another leaf"):
        fused_bce(logits.requires_grad_(), targets, mask)


def test_logits_with_other_strides_do_as_well() -> None:
    logits, targets, mask = draw(6, 40)
    strided = logits.T.contiguous().T.requires_grad_()
    losses = fused_bce(strided * 1, targets, mask, 2)
    losses.backward(slopes_for(6))
    expected_losses, expected_gradient = fused(logits, targets, mask, 2)
    assert torch.equal(losses.detach(), expected_losses)
    assert strided.grad is not None
    assert torch.equal(strided.grad, expected_gradient)


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(shares, "BYTES_WORTH_THREADS", 1)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", CLOSE)
def test_threads_change_nothing(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    logits, targets, mask = draw(10, 33)
    alone = fused(logits.to(dtype), targets, mask, 4)
    request.getfixturevalue("three_threads")
    for found, expected in zip(fused(logits.to(dtype), targets, mask, 4), alone, strict=True):
        assert torch.equal(found, expected)


# ---- Triton


INTERPRETED = """
import json, sys, torch
sys.path.insert(0, sys.argv[2])
from test_fused_bce import draw, reference, slopes_for
from bce3s.losses import fused_bce_triton
from bce3s.losses.fused_bce import RowTargets
results = []
for num_rows, num_classes, num_masked, dtype, clamp in json.loads(sys.argv[1]):
    logits, targets, mask = draw(num_rows, num_classes)
    logits = logits.to(getattr(torch, dtype))
    logits[0, 0], logits[-1, -1] = 70.0, -300.0
    expected_losses, expected_gradient = reference(logits, targets, mask, num_masked, clamp)
    rows = RowTargets(targets.labels_B, targets.partner_labels_B, targets.lam, mask.float(), num_masked, clamp)
    losses = fused_bce_triton.losses(logits, rows)
    fused_bce_triton.overwrite(logits, rows, slopes_for(num_rows))
    rtol = 2 * torch.finfo(logits.dtype).eps
    fine = torch.allclose(losses, expected_losses, rtol=1e-5) and torch.allclose(logits, expected_gradient, rtol=max(rtol, 1e-5), atol=2e-6)
    nan = torch.full((1, num_classes), float("nan"), dtype=logits.dtype)
    results.append(fine and bool(fused_bce_triton.losses(nan, rows).isnan().all()))
print(json.dumps(results))
"""


def test_triton_kernels_give_the_same_losses_and_gradients() -> None:
    """In Triton's interpreter: one block a row and several, blocks that overhang, every precision."""
    pytest.importorskip("triton", reason="Triton is not installed")
    cases = [[6, 40, 2, dtype, 64.0] for dtype in ("bfloat16", "float16", "float32")]
    cases += [[3, 2100, 3, "bfloat16", 64.0], [2, 1024, 0, "float32", 1000.0], [9, 1, 4, "float32", 64.0]]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED, json.dumps(cases), str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [True] * len(cases)


@pytest.mark.parametrize(("name", "stores"), [("_losses_kernel", 0), ("_overwrite_kernel", 1)])
@pytest.mark.parametrize("any_number_of_classes", [False, True])
def test_triton_kernels_compile_for_a_gpu(
    name: str, stores: int, any_number_of_classes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With wide loads where the number of classes is known to be a multiple of 16, and without that."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from bce3s.losses import fused_bce_triton

    kernel = getattr(fused_bce_triton, name)
    pointers = ["*bf16", "*i64", "*i64", "*fp32", "*fp32", "*fp32"]
    types = dict(zip(kernel.arg_names, [*pointers, "i32", "i32", "fp32"], strict=False)) | {"BLOCK": "constexpr"}
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=types,
        constexprs={"BLOCK": fused_bce_triton.BLOCK_CLASSES},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(6 if any_number_of_classes else 7)},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    assembly = triton.compile(source, target=target, options={"num_warps": fused_bce_triton.NUM_WARPS}).asm["ptx"]
    if not any_number_of_classes:
        assert assembly.count("ld.global.v4.b32") >= 3  # 16 bytes of logits, 32 of the mask
        assert assembly.count("st.global.v4.b32") == stores
    assert "atom" not in assembly


# ---- CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_classes", [10, 1000, 8142])
def test_cuda_agrees_with_the_reference_and_never_waits(dtype: torch.dtype, num_classes: int) -> None:
    logits, targets, mask = draw(12, num_classes)
    on_cuda = MixedTargets(targets.labels_B.cuda(), targets.partner_labels_B.cuda(), targets.lam.cuda())
    expected = reference(logits.to(dtype), targets, mask, 4, 64.0)
    leaf, slopes, mask_on_cuda = logits.to(dtype).cuda().requires_grad_(), slopes_for(12).cuda(), mask.cuda()
    for is_watched in (False, True):  # the first compiles, which may wait
        leaf.grad = None
        torch.cuda.set_sync_debug_mode("error" if is_watched else "default")
        try:
            losses = fused_bce(leaf * 1, on_cuda, mask_on_cuda, 4)
            losses.backward(slopes)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert leaf.grad is not None
    torch.testing.assert_close(losses.detach().cpu(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.cpu(), expected[1], rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=2e-6)


@pytest.mark.cuda
def test_a_cuda_graph_replays_the_loss_of_new_logits() -> None:
    logits, targets, mask = draw(12, 500)
    on_cuda = MixedTargets(targets.labels_B.cuda(), targets.partner_labels_B.cuda(), targets.lam.cuda())
    leaf, mask_on_cuda = logits.cuda().requires_grad_(), mask.cuda()

    def step() -> tuple[Tensor, Tensor]:
        losses = fused_bce(leaf * 1, on_cuda, mask_on_cuda, 4)
        return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses, gradient = step()
    for seed in (1, 2):
        other = draw(12, 500, seed)[0]
        with torch.no_grad():
            leaf.copy_(other)
        graph.replay()
        on_cpu = other.clone().requires_grad_()
        expected = _reference_rows(on_cpu, targets, mask, 4, 64.0)
        torch.testing.assert_close(losses.cpu(), expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.cpu(), torch.autograd.grad(expected.sum(), on_cpu)[0], rtol=1e-5, atol=2e-6)
