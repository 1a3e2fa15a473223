"""Every operation equals Pillow's pixel by pixel (no tolerance), and the draw is the published distribution, sample by sample."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines.augment import policies, shares
from pipelines.augment.cutout import cutout, draw_cutout_centers
from pipelines.augment.pixel_ops import Op
from pipelines.augment.policies import (
    AUTOAUGMENT_CIFAR10,
    POLICY_TABLE,
    PolicyPlan,
    apply_policy,
    apply_reference,
    compile_policy,
    draw_policy,
)
from pipelines.config import POLICIES
from pipelines.randomness import position_keys
from pipelines.types import ConfigError

GREY = (128, 128, 128)
OPS = [op for op in Op if op != Op.IDENTITY]
SIGNED = {Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR, Op.SHARPNESS}
ENHANCERS = {
    Op.BRIGHTNESS: ImageEnhance.Brightness,
    Op.CONTRAST: ImageEnhance.Contrast,
    Op.COLOR: ImageEnhance.Color,
    Op.SHARPNESS: ImageEnhance.Sharpness,
}
PUBLISHED = """
Invert 0.1 7 Contrast 0.2 6, Rotate 0.7 2 TranslateX 0.3 9, Sharpness 0.8 1 Sharpness 0.9 3, ShearY 0.5 8 TranslateY 0.7 9,
AutoContrast 0.5 8 Equalize 0.9 2, ShearY 0.2 7 Posterize 0.3 7, Color 0.4 3 Brightness 0.6 7, Sharpness 0.3 9 Brightness 0.7 9,
Equalize 0.6 5 Equalize 0.5 1, Contrast 0.6 7 Sharpness 0.6 5, Color 0.7 7 TranslateX 0.5 8, Equalize 0.3 7 AutoContrast 0.4 8,
TranslateY 0.4 3 Sharpness 0.2 6, Brightness 0.9 6 Color 0.2 8, Solarize 0.5 2 Invert 0.0 3, Equalize 0.2 0 AutoContrast 0.6 0,
Equalize 0.2 8 Equalize 0.8 4, Color 0.9 9 Equalize 0.6 6, AutoContrast 0.8 4 Solarize 0.2 8, Brightness 0.1 3 Color 0.7 0,
Solarize 0.4 5 AutoContrast 0.9 3, TranslateY 0.9 9 TranslateY 0.7 9, AutoContrast 0.9 2 Solarize 0.8 3, Equalize 0.8 8 Invert 0.1 3,
TranslateY 0.7 9 AutoContrast 0.9 1
"""


def keys(num_samples: int, base: int = 7) -> NDArray[np.uint64]:
    return position_keys(base, np.arange(num_samples))


def pillow(op: Op, amount: float, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One operation as the per-image pipelines do it."""
    image = Image.fromarray(pixels)
    width, height = image.size
    matrices = {
        Op.SHEAR_X: (1, amount, 0, 0, 1, 0),
        Op.SHEAR_Y: (1, 0, 0, amount, 1, 0),
        Op.TRANSLATE_X: (1, 0, amount * width, 0, 1, 0),
        Op.TRANSLATE_Y: (1, 0, 0, 0, 1, amount * height),
    }
    if op in matrices:
        image = image.transform(image.size, Image.Transform.AFFINE, matrices[op], Image.Resampling.NEAREST, fillcolor=GREY)
    elif op == Op.ROTATE:
        image = image.rotate(amount, fillcolor=GREY)
    elif op in ENHANCERS:
        image = ENHANCERS[op](image).enhance(amount)
    elif op == Op.POSTERIZE:
        image = ImageOps.posterize(image, int(amount))
    elif op == Op.SOLARIZE:
        image = ImageOps.solarize(image, amount)  # type: ignore[arg-type]
    elif op != Op.IDENTITY:
        image = {Op.INVERT: ImageOps.invert, Op.AUTOCONTRAST: ImageOps.autocontrast, Op.EQUALIZE: ImageOps.equalize}[op](image)
    return np.asarray(image)


def magnitudes(op: Op) -> NDArray[np.float64]:
    """Published magnitude of each index 0…9, in double."""
    ranges = {Op.ROTATE: (0, 30), Op.POSTERIZE: (8, 4), Op.SOLARIZE: (256, 0), Op.SHEAR_X: (0, 0.3), Op.SHEAR_Y: (0, 0.3)}
    ranges |= {Op.TRANSLATE_X: (0, 150 / 331), Op.TRANSLATE_Y: (0, 150 / 331)} | dict.fromkeys(ENHANCERS, (0, 0.9))
    values = np.linspace(*ranges.get(op, (0, 0)), 10)
    return np.round(values) if op == Op.POSTERIZE else values


def signed_amounts(op: Op) -> list[float]:
    """Every amount the operation can get."""
    signs = (1, -1) if op in SIGNED else (1,)
    return [float((op in ENHANCERS) + sign * value) for value in magnitudes(op) for sign in signs]


def sample_images(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Noise, a narrow and a dark range, ramps, one level, one level a channel, two levels, a single odd pixel: uint8 [8, H, W, 3]."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (8, height, width, 3), dtype=np.uint8)
    images[1] = images[1] // 8 + 97
    images[2] = images[2] // 32
    images[3] = np.linspace(0, 255, width)[None, :, None] * [1.0, 0.5, 0.25] + np.arange(height)[:, None, None] % 3
    images[4] = 201
    images[5] = [0, 128, 255]
    images[6] = images[6] // 128 * 90 + 30
    images[7] = 60
    images[7, height // 2, width // 2] = [61, 59, 255]
    return images


def plan_of(*rows: tuple[tuple[Op, float], tuple[Op, float]]) -> PolicyPlan:
    return PolicyPlan(
        ops_S2=np.array([[op for op, _ in row] for row in rows], np.int8),
        amounts_S2=np.array([[amount for _, amount in row] for row in rows], np.float32),
    )


NOTHING = (Op.IDENTITY, 0.0)

Apply = Callable[[torch.Tensor, PolicyPlan], torch.Tensor]
# On a CPU `apply_policy` runs compiled loops; what CUDA runs is tested here, too.
EVERY_WAY = pytest.mark.parametrize("apply", [pytest.param(apply_policy, id="compiled"), pytest.param(apply_reference, id="torch")])


# ---- the table


def test_table_names_the_policies_of_the_config() -> None:
    assert tuple(POLICY_TABLE) == POLICIES


def test_autoaugment_cifar10_is_the_published_list() -> None:
    names = {op: op.name.replace("_", "").lower() for op in Op}
    ours = [" ".join(f"{names[op]} {p} {index}" for op, p, index in pair) for pair in AUTOAUGMENT_CIFAR10]
    assert ours == [row.strip().lower() for row in PUBLISHED.split(",")]
    assert len(ours) == 25


@pytest.mark.parametrize("op", list(Op))
def test_magnitudes_are_the_published_ranges(op: Op) -> None:
    fixed, signed = policies.MAGNITUDES[op]
    assert (op in SIGNED) == bool(signed.any())
    np.testing.assert_array_equal(signed if op in SIGNED else fixed, magnitudes(op))
    np.testing.assert_array_equal(fixed if op in SIGNED else signed, float(op in ENHANCERS))


def test_unknown_policy_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"policy 'autoaugment'; known: none, autoaugment-cifar10"):
        draw_policy("autoaugment", keys(2))


def test_another_policy_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [((first, 1.0, 5), (second, 1.0, 5)) for first in OPS for second in OPS]
    monkeypatch.setitem(POLICY_TABLE, "all-pairs", compile_policy(pairs))
    plan = draw_policy("all-pairs", keys(8000))
    assert {(int(a), int(b)) for a, b in plan.ops_S2} == {(a, b) for a in OPS for b in OPS}
    images = torch.from_numpy(sample_images(8, 9))
    assert apply_policy(images, draw_policy("all-pairs", keys(8))).shape == images.shape


# ---- the draw


def test_draw_is_a_pure_function_of_each_key() -> None:
    all_keys = keys(500)
    plan = draw_policy("autoaugment-cifar10", all_keys)
    assert plan.ops_S2.dtype == np.int8
    assert plan.amounts_S2.dtype == np.float32
    for rows in (slice(None), slice(100, 107), np.random.default_rng(0).permutation(500)):
        again = draw_policy("autoaugment-cifar10", all_keys[rows])
        np.testing.assert_array_equal(again.ops_S2, plan.ops_S2[rows])
        np.testing.assert_array_equal(again.amounts_S2, plan.amounts_S2[rows])
    assert (plan.amounts_S2[plan.ops_S2 == Op.IDENTITY] == 0).all()


def test_operations_come_as_often_as_published() -> None:
    num_samples = 60_000
    plan = draw_policy("autoaugment-cifar10", keys(num_samples))
    drawn = Counter((int(a), int(b)) for a, b in plan.ops_S2)
    expected: Counter[tuple[int, int]] = Counter()
    for (first, p, _), (second, q, _) in AUTOAUGMENT_CIFAR10:
        for a, b in ((first, second), (first, 0), (0, second), (0, 0)):
            expected[a, b] += num_samples / 25 * (p if a else 1 - p) * (q if b else 1 - q)  # type: ignore[assignment]
    expected += Counter()  # drops what cannot happen
    assert set(drawn) <= set(expected)
    chi_square = sum((drawn[pair] - count) ** 2 / count for pair, count in expected.items())
    freedom = len(expected) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_every_amount_comes_with_both_signs_equally_often() -> None:
    plan = draw_policy("autoaugment-cifar10", keys(60_000))
    for op in OPS:
        of_op = plan.ops_S2 == op
        amounts = plan.amounts_S2[of_op]
        assert set(amounts.tolist()) <= {float(np.float32(amount)) for amount in signed_amounts(op)}
        swings = (amounts - float(op in ENHANCERS)) * (op in SIGNED)
        swings = swings[swings != 0]
        if len(swings):
            assert abs(np.mean(swings > 0) - 0.5) < 2 / math.sqrt(len(swings))
    both = (plan.ops_S2 == Op.TRANSLATE_Y).all(1)
    assert abs(np.mean(plan.amounts_S2[both, 0] == plan.amounts_S2[both, 1]) - 0.5) < 2 / math.sqrt(both.sum())


# ---- the pixels


@EVERY_WAY
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (21, 40)])
def test_operation_equals_pillow_at_every_magnitude(apply: Apply, op: Op, stage: int, height: int, width: int) -> None:
    amounts = signed_amounts(op)
    images = sample_images(height, width, seed=int(op))
    rows = [((op, amount), NOTHING)[:: 1 - 2 * stage] for _ in images for amount in amounts]
    batch = np.repeat(images, len(amounts), axis=0)
    changed = apply(torch.from_numpy(batch), plan_of(*rows)).numpy()  # type: ignore[arg-type]
    expected = np.stack([pillow(op, amount, image) for image in images for amount in amounts])
    np.testing.assert_array_equal(changed, expected)


@EVERY_WAY
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(height=st.integers(8, 40), width=st.integers(8, 40), base=st.integers(0, 2**64 - 1))
def test_drawn_plans_equal_pillow_in_any_shape(apply: Apply, policy: str, height: int, width: int, base: int) -> None:
    plan = draw_policy(policy, keys(16, base))
    images = np.concatenate([sample_images(height, width, base % 1000), sample_images(height, width, base % 1000 + 1)])
    expected = images.copy()
    for stage in (0, 1):
        for row in range(16):
            expected[row] = pillow(Op(plan.ops_S2[row, stage]), float(plan.amounts_S2[row, stage]), expected[row])
    np.testing.assert_array_equal(apply(torch.from_numpy(images), plan).numpy(), expected)


@EVERY_WAY
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    op=st.sampled_from([Op.SHEAR_X, Op.SHEAR_Y, Op.ROTATE, *ENHANCERS]),
    amount=st.floats(0, 2, width=32),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
)
def test_amounts_between_the_indices_equal_pillow(apply: Apply, op: Op, amount: float, height: int, width: int) -> None:
    amount = amount * 80 if op == Op.ROTATE else amount
    images = sample_images(height, width)
    changed = apply(torch.from_numpy(images), plan_of(*[((op, amount), NOTHING)] * len(images))).numpy()
    expected = np.stack([pillow(op, float(np.float32(amount)), image) for image in images])
    np.testing.assert_array_equal(changed, expected)


@EVERY_WAY
def test_images_do_not_depend_on_their_neighbours(apply: Apply) -> None:
    images = torch.from_numpy(np.concatenate([sample_images(16, 24, seed) for seed in range(20)]))
    plan = draw_policy("autoaugment-cifar10", keys(160))
    whole = apply(images, plan)
    order = np.random.default_rng(1).permutation(160)[:90]
    part = apply(images[order], PolicyPlan(ops_S2=plan.ops_S2[order], amounts_S2=plan.amounts_S2[order]))
    assert torch.equal(part, whole[order])


@EVERY_WAY
def test_result_is_a_new_tensor_of_the_same_kind_and_idle_rows_are_kept(apply: Apply) -> None:
    images = torch.from_numpy(np.concatenate([sample_images(12, 20, seed) for seed in range(8)]))
    kept = images.clone()
    plan = draw_policy("autoaugment-cifar10", keys(64))
    # A view with other strides must do as well.
    changed = apply(images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), plan)
    assert (changed.shape, changed.dtype, changed.device) == (images.shape, torch.uint8, images.device)
    assert changed.is_contiguous()
    assert torch.equal(images, kept)
    idle = torch.from_numpy((plan.ops_S2 == Op.IDENTITY).all(1))
    assert idle.any()
    assert torch.equal(changed[idle], images[idle])
    assert not torch.equal(changed, images)


@pytest.mark.parametrize("num_images", [0, 3])
def test_policy_none_gives_the_images_back(num_images: int) -> None:
    images = torch.zeros(num_images, 8, 8, 3, dtype=torch.uint8)
    plan = draw_policy("none", keys(num_images))
    assert plan.ops_S2.shape == plan.amounts_S2.shape == (num_images, 2)
    assert not plan.ops_S2.any()
    assert not plan.amounts_S2.any()
    assert apply_policy(images, plan) is images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(4, 8, 8, 3), r"uint8 images \[S, H, W, 3\], not torch.float32 \[4, 8, 8, 3\]"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), r"not torch.uint8 \[4, 3, 8, 8\]"),
        (torch.zeros(5, 8, 8, 3, dtype=torch.uint8), "plan for 4 samples cannot be applied to 5 images"),
    ],
)
def test_images_that_do_not_fit_the_plan_are_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_policy(images, draw_policy("autoaugment-cifar10", keys(4)))


def test_nothing_waits_for_the_device() -> None:
    # A fake tensor has no values: reading one on the host, or a shape that depends on one, raises.
    plan = draw_policy("autoaugment-cifar10", keys(256))
    assert set(np.unique(plan.ops_S2)) >= {Op.CONTRAST, Op.AUTOCONTRAST, Op.EQUALIZE, Op.COLOR, Op.SHARPNESS, Op.TRANSLATE_Y}
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert apply_reference(torch.empty(256, 16, 16, 3, dtype=torch.uint8), plan).shape == (256, 16, 16, 3)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.from_numpy(np.concatenate([sample_images(16, 24, seed) for seed in range(5)]))
    plan = draw_policy("randaugment", keys(40))
    expected, before = apply_policy(images, plan), torch.get_num_threads()
    monkeypatch.setattr(shares, "BYTES_WORTH_THREADS", 1)
    torch.set_num_threads(3)
    try:
        assert torch.equal(apply_policy(images, plan), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.cuda
def test_cuda_equals_cpu_and_never_waits() -> None:
    images = torch.from_numpy(np.concatenate([sample_images(32, 32, seed) for seed in range(64)]))
    plan = draw_policy("autoaugment-cifar10", keys(512))
    on_cuda = images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        changed = apply_policy(on_cuda, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(changed.cpu(), apply_policy(images, plan))


# ---- cutout


@settings(max_examples=40, deadline=None, derandomize=True)
@given(height=st.integers(8, 40), width=st.integers(8, 40), side=st.integers(0, 50))
def test_cutout_cuts_the_authors_square(height: int, width: int, side: int) -> None:
    images = sample_images(height, width) | np.uint8(1)
    centers = draw_cutout_centers(keys(8, base=side), height, width)
    centers[:2] = [[0, 0], [height - 1, width - 1]]
    expected = images.copy()
    for image, (y, x) in zip(expected, centers.tolist(), strict=True):
        top, bottom, left, right = (max(0, v) for v in (y - side // 2, y + side // 2, x - side // 2, x + side // 2))
        image[top:bottom, left:right] = 0
    source = torch.from_numpy(images.copy())
    result = cutout(source, torch.from_numpy(centers), side)
    assert result.dtype == torch.uint8
    np.testing.assert_array_equal(result.numpy(), expected)
    np.testing.assert_array_equal(source.numpy(), images)


def test_cutout_centers_are_uniform_and_pure() -> None:
    centers = draw_cutout_centers(keys(40_000), 8, 10)
    assert centers.dtype == np.int32
    counts = np.bincount(centers[:, 0] * 10 + centers[:, 1], minlength=80)
    assert len(counts) == 80
    assert abs(((counts - 500) ** 2 / 500).sum() - 79) < 4 * math.sqrt(2 * 79)
    order = np.random.default_rng(0).permutation(40_000)[:99]
    np.testing.assert_array_equal(draw_cutout_centers(keys(40_000)[order], 8, 10), centers[order])
