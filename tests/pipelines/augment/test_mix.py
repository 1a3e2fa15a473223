"""Every way of writing the three views gives the bits of torch's reference, whatever λ, box, size, dtype or number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.augment import shares
from pipelines.augment.mix import channel_statistics, draw_mix, mix_views, normalise, write_views_reference
from pipelines.config import AugmentConfig

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
MEAN, STD = channel_statistics(AugmentConfig(), CPU)
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def pictures(num_sources: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 [2B, H, W, 3] with every level in every channel where there is room."""
    return torch.randint(0, 256, (2 * num_sources, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def reference(images: torch.Tensor, mix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    views = torch.empty((3 * (len(images) // 2), *images.shape[1:]), dtype=dtype)
    write_views_reference(images, mix, MEAN, STD, views)
    return views.permute(0, 3, 1, 2)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(BITS[one.dtype]), other.view(BITS[other.dtype]))


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(shares, "BYTES_WORTH_THREADS", 1)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", list(BITS))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), lam=st.floats(0, 1, width=32) | st.sampled_from([0.5, float(np.nextafter(np.float32(0.5), np.float32(0)))]))
def test_views_are_the_references_bit_for_bit(dtype: torch.dtype, data: st.DataObject, lam: float) -> None:
    num_sources, height, width = (data.draw(st.integers(1, limit)) for limit in (4, 40, 40))
    y0, y1 = sorted(data.draw(st.tuples(st.integers(0, height), st.integers(0, height))))
    x0, x1 = sorted(data.draw(st.tuples(st.integers(0, width), st.integers(0, width))))
    images, mix = pictures(num_sources, height, width, seed=height), torch.tensor([lam, lam, y0, y1, x0, x1])
    views = mix_views(images, mix, MEAN, STD, dtype)
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert same_bits(views, reference(images, mix, dtype))


@pytest.mark.parametrize("dtype", list(BITS))
def test_every_level_of_every_channel_is_normalised_alike(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, -1, -1, 3)
    expected = ((levels.float() - MEAN) / STD).to(dtype).permute(0, 3, 1, 2)
    assert same_bits(normalise(levels, MEAN, STD, dtype), expected)
    views = mix_views(levels, torch.tensor([1.0, 1, 0, 0, 0, 0]), MEAN, STD, dtype)
    assert all(same_bits(view, expected[:1]) for view in views.split(1))


def test_views_are_what_their_names_say() -> None:
    images = pictures(3, 24, 24)
    source, mixup, cutmix = mix_views(images, torch.tensor([0.25, 0.25, 2, 10, 5, 24]), MEAN, STD, torch.float32).split(3)
    instance, partner = normalise(images, MEAN, STD, torch.float32).split(3)
    assert torch.equal(source, instance)
    torch.testing.assert_close(mixup, 0.25 * instance + 0.75 * partner)
    assert torch.equal(cutmix[..., 2:10, 5:24], partner[..., 2:10, 5:24])
    instance[..., 2:10, 5:24] = cutmix[..., 2:10, 5:24]
    assert torch.equal(cutmix, instance)


@pytest.mark.parametrize("num_sources", [1, 2, 5])
def test_threads_change_nothing(two_threads: None, num_sources: int) -> None:
    images, mix = pictures(num_sources, 20, 33), torch.tensor([0.7, 0.7, 1, 9, 0, 30])
    assert same_bits(mix_views(images, mix, MEAN, STD, torch.bfloat16), reference(images, mix, torch.bfloat16))
    expected = ((images.float() - MEAN) / STD).permute(0, 3, 1, 2)
    assert same_bits(normalise(images, MEAN, STD, torch.float32), expected)


def test_callers_in_many_threads_do_not_meet(two_threads: None) -> None:
    images, mix = pictures(8, 32, 32), torch.tensor([0.3, 0.3, 4, 9, 2, 7])
    expected, found = reference(images, mix, torch.bfloat16), []

    def call() -> None:
        found.extend(same_bits(mix_views(images, mix, MEAN, STD, torch.bfloat16), expected) for _ in range(20))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80
    assert not {thread.name for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name}


@pytest.mark.parametrize("dtype", list(BITS))
def test_views_can_be_written_where_the_last_ones_stood(dtype: torch.dtype) -> None:
    images, mix = pictures(4, 16, 16), torch.from_numpy(draw_mix(0, 0, 0, 16, AugmentConfig()))
    out = mix_views(images, mix, MEAN, STD, dtype)
    other = pictures(4, 16, 16, seed=1)
    assert mix_views(other, mix, MEAN, STD, dtype, out=out) is out
    assert same_bits(out, reference(other, mix, dtype))


def test_images_with_other_strides_do_as_well() -> None:
    images, mix = pictures(2, 16, 12), torch.tensor([0.4, 0.4, 3, 9, 2, 7])
    strided = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert same_bits(mix_views(strided, mix, MEAN, STD, torch.bfloat16), reference(images, mix, torch.bfloat16))


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(6, 3, 8, 8),
        torch.empty(6, 8, 8, 3, dtype=torch.bfloat16).permute(0, 3, 1, 2),
        torch.empty(3, 8, 8, 3).permute(0, 3, 1, 2),
    ],
)
def test_a_place_that_does_not_fit_is_refused(out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"views need torch.float32 \[6, 3, 8, 8\], channels-last, on cpu"):
        mix_views(pictures(2, 8, 8), torch.zeros(6), MEAN, STD, torch.float32, out=out)


# ---- Triton


INTERPRETED = """
import json, sys, torch
from pipelines.augment.mix_triton import write_views
from pipelines.augment.mix import write_views_reference
results = []
for num_sources, height, width, dtype, block, std, *mix in json.loads(sys.argv[1]):
    dtype = getattr(torch, dtype)
    images = torch.randint(0, 256, (2 * num_sources, height, width, 3), dtype=torch.uint8)
    mix, mean, std = torch.tensor(mix), torch.tensor([123.7, 116.3, 103.5]), torch.tensor([std, 1.7 * std, 57.375])
    ours = torch.full((3 * num_sources, height, width, 3), 99.0, dtype=dtype)
    expected = torch.empty_like(ours)
    write_views(images, mix, mean, std, ours, block_levels=block)
    write_views_reference(images, mix, mean, std, expected)
    # Some versions of the interpreter round a fused multiply-add twice, or cut bits off where a device rounds: a unit in the last place.
    smallest = torch.finfo(torch.float32).eps * float(expected.abs().amax()) if len(expected) else 0.0
    results.append(torch.allclose(ours.double(), expected.double(), rtol=torch.finfo(dtype).eps, atol=smallest))
print(json.dumps(results))
"""


def test_triton_kernel_gives_the_same_views() -> None:
    """In Triton's interpreter: several blocks an image, blocks that overhang it, both ends of λ."""
    pytest.importorskip("triton", reason="Triton is not installed")
    cases = [
        [2, 16, 24, dtype, block, std, lam, lam, *box]
        for dtype in ("bfloat16", "float16", "float32")
        for block, std, lam, box in ((1024, 58.395, 0.3, (2, 9, 5, 20)), (256, 0.9, 0.8, (0, 16, 0, 24)))
    ]
    cases += [[1, 9, 7, "float32", 128, 3.3, 0.5, 0.5, 3, 4, 0, 7], [0, 8, 8, "float32", 128, 1.0, 0.5, 0.5, 3, 4, 0, 7]]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED, json.dumps(cases)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [True] * len(cases)


def test_triton_kernel_compiles_for_a_gpu_with_wide_loads_and_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interpreter takes what the compiler refuses, and does not show how memory is read."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from pipelines.augment import mix_triton

    pointers = {"images": "*u8", "mix": "*fp32", "mean": "*fp32", "std": "*fp32", "views": "*bf16"}
    constants = {"IMAGE_LEVELS": 224 * 224 * 3, "ROW_LEVELS": 224 * 3, "BLOCK": mix_triton.BLOCK_LEVELS}
    source = triton.compiler.ASTSource(
        fn=mix_triton._mix_kernel,
        signature=pointers | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    options = {"num_warps": mix_triton.NUM_WARPS, "enable_fp_fusion": False}
    assembly = triton.compile(source, target=target, options=options).asm["ptx"]
    assert assembly.count("st.global.v4.b32") == 3  # one of 16 bytes for each view
    assert assembly.count("ld.global.v2.b32") == 2  # one of 8 bytes for each batch
    assert "shared" not in assembly


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize(("num_sources", "side"), [(1, 9), (3, 32), (4, 224)])
def test_cuda_gives_the_same_bits_and_never_waits(dtype: torch.dtype, num_sources: int, side: int) -> None:
    images, mix = pictures(num_sources, side, side), torch.from_numpy(draw_mix(3, 0, 1, side, AugmentConfig()))
    arguments = [tensor.cuda() for tensor in (images, mix, MEAN, STD)]
    out = mix_views(*arguments, dtype)  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        mix_views(*arguments, dtype, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same_bits(out.cpu(), reference(images, mix, dtype))


@pytest.mark.cuda
def test_a_cuda_graph_replays_the_views_of_new_images() -> None:
    images, mix = pictures(4, 64, 64), torch.from_numpy(draw_mix(3, 0, 1, 64, AugmentConfig()))
    static = [tensor.cuda() for tensor in (images, mix, MEAN, STD)]
    out = mix_views(*static, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mix_views(*static, torch.bfloat16, out=out)
    other, other_mix = pictures(4, 64, 64, seed=1), torch.from_numpy(draw_mix(3, 0, 2, 64, AugmentConfig()))
    static[0].copy_(other)
    static[1].copy_(other_mix)
    graph.replay()
    assert same_bits(out.cpu(), reference(other, other_mix, torch.bfloat16))
