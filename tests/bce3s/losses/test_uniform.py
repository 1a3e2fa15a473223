"""The blocked uniform term is the dense one, value and gradient, whole, in shares, sampled and on a GPU, without a [K, K] matrix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from bce3s.losses import Share
from bce3s.losses.terms import uniform_bce
from bce3s.losses.uniform import uniform_term

ROOT = Path(__file__).resolve().parents[3]
CLOSE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}


def rows_of(num_classes: int, dim: int, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Tensor:
    """Normalised rows [K, D]; the smaller `spread`, the closer to each other."""
    rows = 1 + spread * torch.randn(num_classes, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(num_classes))
    return functional.normalize(rows, dim=1).to(dtype).requires_grad_()


def value_and_gradient(term: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(term, rows)
    return term.detach(), gradient


@pytest.mark.parametrize("dtype", CLOSE)
@given(num_classes=st.integers(1, 40), dim=st.integers(1, 20), block_rows=st.integers(1, 45))
def test_blocks_of_any_size_give_the_dense_value_and_gradient(dtype: torch.dtype, num_classes: int, dim: int, block_rows: int) -> None:
    rows = rows_of(num_classes, dim, dtype)
    found = value_and_gradient(3.0 * uniform_term(rows, block_rows=block_rows), rows)
    expected = value_and_gradient(3.0 * uniform_bce(rows), rows)
    for ours, dense in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, dense, **CLOSE[dtype])


@pytest.mark.parametrize("samples", [0, 4])
def test_gradient_is_the_derivative(samples: int) -> None:
    key = torch.tensor(11)
    assert torch.autograd.gradcheck(lambda rows: uniform_term(rows, Share(1, 2, 0.5), samples, key, block_rows=2), (rows_of(7, 3),))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("block_rows", [2, 5, 100])
@pytest.mark.parametrize("samples", [0, 8])
def test_the_mean_over_shares_is_the_whole(count: int, block_rows: int, samples: int) -> None:
    """Blocks of 100 rows make one pair: most shares have none."""
    rows, key = rows_of(12, 5), torch.tensor(3)
    parts = [value_and_gradient(uniform_term(rows, Share(i, count, 1 / count), samples, key, block_rows), rows) for i in range(count)]
    whole = value_and_gradient(uniform_term(rows, Share(), samples, key, block_rows), rows)
    for place, expected in enumerate(whole):
        torch.testing.assert_close(sum(part[place] for part in parts) / count, expected, rtol=1e-12, atol=1e-12)


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_nothing_is_larger_than_the_rows_or_one_block() -> None:
    rows = rows_of(300, 4, torch.float32)
    with LargestResult() as largest:
        uniform_term(rows, block_rows=40).backward()
    assert largest.elements == 40 * 40
    with LargestResult() as dense:
        uniform_bce(rows).backward()
    assert dense.elements == 300 * 300


def test_a_value_without_gradient_multiplies_once_a_pair() -> None:
    rows = rows_of(30, 4, torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        uniform_term(rows, block_rows=10)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::mm"] == 6
    assert "aten::addmm_" not in calls


def test_autocast_is_no_further_from_the_truth_than_the_dense_term() -> None:
    rows = rows_of(200, 64, torch.float32, spread=2.0)
    truth = value_and_gradient(uniform_bce(rows.double()), rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, dense = (value_and_gradient(term, rows) for term in (uniform_term(rows, block_rows=70), uniform_bce(rows)))
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == torch.float32
    for found, reference, exact in zip(ours, dense, truth, strict=True):
        assert (found - exact).norm() <= 1.1 * (reference - exact).norm() + 1e-4 * exact.norm()


def test_a_sample_gives_the_value_and_gradient_of_all_classes_on_average() -> None:
    rows, num_keys = rows_of(12, 4, spread=2.0), 3000
    found = [value_and_gradient(uniform_term(rows, Share(), 5, torch.tensor(key), block_rows=100), rows) for key in range(num_keys)]
    for place, expected in enumerate(value_and_gradient(uniform_bce(rows), rows)):
        estimates = torch.stack([one[place] for one in found])
        deviation = estimates.std(0) / num_keys**0.5
        assert (deviation > 0).all()
        assert ((estimates.mean(0) - expected).abs() / deviation).max() < 4


@pytest.mark.parametrize("samples", [12, 13])
def test_a_sample_of_all_classes_is_exact(samples: int) -> None:
    rows = rows_of(12, 4)
    torch.testing.assert_close(uniform_term(rows, Share(), samples, torch.tensor(1)), uniform_bce(rows), rtol=1e-12, atol=0)


# ---- Triton


INTERPRETED = """
import json, sys, torch
from bce3s.losses.uniform import _torch_block_terms
from bce3s.losses.uniform_triton import block_terms
results = []
for num_rows, num_columns, depth, dtype, same_ratio, wants_slopes in json.loads(sys.argv[1]):
    dtype = getattr(torch, dtype)
    rows = torch.nn.functional.normalize(torch.randn(num_rows, depth), dim=1).to(dtype)
    columns = rows if same_ratio is not None else torch.nn.functional.normalize(torch.randn(num_columns, depth), dim=1).to(dtype)
    total, slopes = block_terms(rows, columns, same_ratio, wants_slopes)
    expected, expected_slopes = _torch_block_terms(rows.double(), columns.double(), same_ratio, wants_slopes)
    fine = torch.isclose(total.double(), expected, rtol=1e-5)
    if wants_slopes:
        fine &= slopes.dtype == dtype and torch.allclose(slopes.double(), expected_slopes, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    results.append(bool(fine) and (slopes is None) == (not wants_slopes))
print(json.dumps(results))
"""


def test_triton_kernel_gives_the_same_block() -> None:
    """In its interpreter, which cannot multiply bfloat16: several tiles, tiles that overhang, a diagonal with its own weight."""
    pytest.importorskip("triton", reason="Triton is not installed")
    cases = [case for dtype in ("float16", "float32") for case in ([150, 140, 70, dtype, None, True], [130, 130, 40, dtype, 0.3, True])]
    cases += [[1, 1, 1, "float32", 1.0, True], [5, 200, 33, "float32", None, False]]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED, json.dumps(cases)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [True] * len(cases)


KINDS_OF_PRODUCTS = [(torch.bfloat16, "*bf16", "ieee"), (torch.float32, "*fp32", "ieee"), (torch.float32, "*fp32", "tf32")]


@pytest.mark.parametrize(("dtype", "pointer", "precision"), KINDS_OF_PRODUCTS)
@pytest.mark.parametrize("capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100, 120))])
def test_triton_kernel_compiles_for_a_gpu(
    dtype: torch.dtype, pointer: str, precision: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Half precision on the tensor cores, float32 as it is or as TF32, copies of 16 bytes that overlap the products."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from bce3s.losses import uniform_triton

    types = {"rows": pointer, "columns": pointer, "sums": "*fp32", "slopes": pointer}
    types |= dict.fromkeys(("num_rows", "num_columns", "depth"), "i32") | {"same_ratio": "fp32"}
    constants = {
        "ON_DIAGONAL": True,
        "WITH_SLOPES": True,
        "ROWS": uniform_triton.BLOCK_ROWS,
        "COLUMNS": uniform_triton.BLOCK_COLUMNS,
        "DEPTH": uniform_triton.BLOCK_DEPTHS[dtype],
        "PRECISION": precision,
    }
    source = triton.compiler.ASTSource(
        fn=uniform_triton._block_kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(7)},
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": uniform_triton.NUM_WARPS, "num_stages": uniform_triton.NUM_STAGES}
    compiled = triton.compile(source, target=target, options=options)
    assembly = compiled.asm["ptx"]
    assert ("tf32" in assembly) == (precision == "tf32")
    assert "cp.async.cg.shared.global" in assembly
    if capability == 90:
        assert ("wgmma" in assembly) == (dtype == torch.bfloat16 or precision == "tf32")
    assert compiled.metadata.shared <= (99 if capability == 120 else 163) << 10  # of a multiprocessor, the least of 80, 90 and 100


# ---- CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_the_cpu_repeats_its_bits_and_never_waits(dtype: torch.dtype) -> None:
    rows = rows_of(5000, 96, torch.float32)
    on_cuda = rows.detach().cuda().requires_grad_()
    runs = []
    for is_watched in (False, True, True):  # the first compiles, which may wait
        torch.cuda.set_sync_debug_mode("error" if is_watched else "default")
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                runs.append(value_and_gradient(uniform_term(on_cuda), on_cuda))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    for place, expected in enumerate(value_and_gradient(uniform_term(rows), rows)):
        assert torch.equal(runs[1][place], runs[2][place])
        torch.testing.assert_close(runs[2][place].cpu(), expected, **tolerance)
