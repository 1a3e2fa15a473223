"""RandAugment: what is drawn, and each operation against NVIDIA DALI's of the same magnitude on a photograph."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.augment.pixel_ops import Op
from pipelines.augment.policies import RANDAUGMENT_MAGNITUDES, PolicyPlan, apply_policy, draw_policy
from pipelines.randomness import position_keys

SIDE = 224
MAGNITUDE = 9
ENHANCERS = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR, Op.SHARPNESS)
NAMES = {Op.AUTOCONTRAST: "auto_contrast"}
# Levels that may differ by more than one, as a share, and how far apart levels may be. DALI rounds scaled levels where Pillow truncates,
# places rotated pixels in floating point, and sharpens the image's edge, which Pillow keeps. Its equalize is OpenCV's, which leaves out the
# darkest level where Pillow leaves out the brightest: photographs with many pixels there come out up to 15 levels apart, this one 2.
EXACT, ROUNDED = (0.0, 0), (0.0, 1)
TOLERANCES = {Op.ROTATE: (0.002, 255), Op.EQUALIZE: (0.06, 3), Op.SHARPNESS: (4 / SIDE, 255)}
TOLERANCES |= dict.fromkeys((Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR, Op.AUTOCONTRAST), ROUNDED)
# Which way is "positive" for each: both draw signs at random, so it does not matter to a policy.
MIRRORED = {Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y}


def test_randaugment_applies_two_of_its_fourteen_operations_each_as_often_as_any_other() -> None:
    num_samples = 60_000
    plan = draw_policy("randaugment", position_keys(7, np.arange(num_samples)))
    operations = [op for op in Op if op != Op.INVERT]
    counts = Counter((int(a), int(b)) for a, b in plan.ops_S2)
    assert set(counts) == {(a, b) for a in operations for b in operations}
    expected = num_samples / len(counts)
    chi_square, freedom = sum((count - expected) ** 2 / expected for count in counts.values()), len(counts) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_randaugment_takes_three_tenths_of_each_range() -> None:
    """Magnitude 9 of 30, as torchvision and DALI count: 30 % of the way from doing nothing, in both directions."""
    plan = draw_policy("randaugment", position_keys(7, np.arange(20_000)))
    swings = {Op.SHEAR_X: 0.09, Op.SHEAR_Y: 0.09, Op.TRANSLATE_X: 0.3 * 150 / 331, Op.TRANSLATE_Y: 0.3 * 150 / 331, Op.ROTATE: 9.0}
    expected = {op: [-swing, swing] for op, swing in swings.items()} | {op: [0.73, 1.27] for op in ENHANCERS}
    expected |= {Op.POSTERIZE: [7.0], Op.SOLARIZE: [179.2], Op.IDENTITY: [0.0], Op.AUTOCONTRAST: [0.0], Op.EQUALIZE: [0.0], Op.INVERT: []}
    for op in Op:
        amounts = plan.amounts_S2[plan.ops_S2 == op]
        np.testing.assert_allclose(np.unique(amounts), expected[op], rtol=1e-6)
        if len(expected[op]) == 2:
            assert abs(np.mean(amounts > np.mean(expected[op])) - 0.5) < 2 / math.sqrt(len(amounts))


@pytest.fixture(scope="module")
def photograph(shared_data: Path) -> NDArray[np.uint8]:
    with Image.open(shared_data / "photos" / "n02101006_Gordon_setter.JPEG") as image:
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE)))


def dali(op: Op, sign: int, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """DALI's operation at `sign` times magnitude 9 of 30; nearest sampling, grey outside, translations up to 150/331 of the side."""
    rand_augment = pytest.importorskip("nvidia.dali.auto_aug.rand_augment", reason="NVIDIA DALI is not installed")
    from nvidia.dali import fn, pipeline_def, types

    suite = rand_augment.get_rand_augment_suite(use_shape=True, max_translate_rel=150 / 331)
    augmentation = next(one for one in suite if one.name == NAMES.get(op, op.name.lower()))
    if augmentation.randomly_negate:
        low, high = augmentation.mag_range
        augmentation = augmentation.augmentation(mag_range=(sign * low, sign * high), randomly_negate=False)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, enable_conditionals=True)  # type: ignore[untyped-decorator]
    def one_operation() -> Any:
        image = fn.external_source(source=lambda: [pixels], batch=True, layout="HWC")
        options = {"shape": (SIDE, SIDE), "fill_value": 128, "interp_type": types.INTERP_NN}
        return augmentation(image, magnitude_bin=MAGNITUDE, num_magnitude_bins=31, **options)

    with warnings.catch_warnings(record=True):  # DALI's suite calls operators by names that DALI has deprecated
        pipeline = one_operation()
        pipeline.build()
    result: NDArray[np.uint8] = np.array(pipeline.run()[0].as_array()[0])
    return result


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("op", [op for op in Op if op != Op.INVERT])
def test_operation_agrees_with_dali(photograph: NDArray[np.uint8], op: Op, sign: int) -> None:
    fixed, signed = RANDAUGMENT_MAGNITUDES[op]
    amount = fixed[MAGNITUDE] + (-sign if op in MIRRORED else sign) * signed[MAGNITUDE]
    plan = PolicyPlan(ops_S2=np.array([[op, 0]], np.int8), amounts_S2=np.array([[amount, 0]], np.float32))
    ours = apply_policy(torch.from_numpy(photograph[None].copy()), plan)[0].numpy()
    apart = np.abs(ours.astype(int) - dali(op, sign, photograph))
    share, furthest = TOLERANCES.get(op, EXACT)
    assert np.mean(apart > 1) <= share
    assert apart.max() <= furthest
    if op == Op.SHARPNESS:
        assert apart[1:-1, 1:-1].max() <= 1
