"""Colour and geometry policies: drawn on the host from one key a sample, applied on the device to the whole batch.

A policy is a list of sub-policies, each two (operation, probability, magnitude index). Every sample draws a sub-policy; each of its two
operations then happens with its probability, its magnitude with a random sign. `POLICY_TABLE` names the policies; another one is one more
entry, as RandAugment shows: all pairs of its operations, at one magnitude.

Geometry samples the nearest pixel and fills with grey 128 throughout; DeepVoltaire's port does the same except for shears (bicubic).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.augment.pixel_ops import Op, remap, saturate, sharpen, upload, warp
from pipelines.augment.pixel_ops_numba import apply_stages
from pipelines.augment.shares import in_shares
from pipelines.config import require_choice
from pipelines.randomness import FloatArray, KeyArray, uniforms

SubPolicy = tuple[tuple[Op, float, int], tuple[Op, float, int]]

Magnitudes = Mapping[Op, tuple[FloatArray, FloatArray]]


def _magnitudes(num_bins: int) -> dict[Op, tuple[FloatArray, FloatArray]]:
    """Per magnitude index 0…num_bins − 1 the fixed and the signed part of the amount, fixed ± signed: Cubuk et al. 2019, Table 6."""
    zero = np.zeros(num_bins)
    shear, translate, enhance = (np.linspace(0, largest, num_bins) for largest in (0.3, 150 / 331, 0.9))
    fixed = {
        Op.ROTATE: np.linspace(0, 30, num_bins),
        Op.POSTERIZE: np.round(np.linspace(8, 4, num_bins)),
        Op.SOLARIZE: np.linspace(256, 0, num_bins),
    }
    signed = {Op.SHEAR_X: shear, Op.SHEAR_Y: shear, Op.TRANSLATE_X: translate, Op.TRANSLATE_Y: translate}
    for op in (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR, Op.SHARPNESS):
        fixed[op], signed[op] = np.ones(num_bins), enhance
    return {op: (fixed.get(op, zero), signed.get(op, zero)) for op in Op}


# Where signs are random is DeepVoltaire's port (github.com/DeepVoltaire/AutoAugment): not for rotate.
MAGNITUDES: Magnitudes = _magnitudes(10)

# RandAugment counts from 0 to 30 within the same ranges and turns both ways, in torchvision.transforms.RandAugment and in
# nvidia.dali.auto_aug.rand_augment alike; where those two part, translations are torchvision's (DALI: up to 100/224) and solarize is DALI's
# (torchvision: from 255).
RANDAUGMENT_MAGNITUDES: Magnitudes = _magnitudes(31) | {Op.ROTATE: _magnitudes(31)[Op.ROTATE][::-1]}

# Cubuk et al. 2019, "AutoAugment: Learning Augmentation Policies from Data" (arXiv:1805.09501), Table 7.
AUTOAUGMENT_CIFAR10: tuple[SubPolicy, ...] = (
    ((Op.INVERT, 0.1, 7), (Op.CONTRAST, 0.2, 6)),
    ((Op.ROTATE, 0.7, 2), (Op.TRANSLATE_X, 0.3, 9)),
    ((Op.SHARPNESS, 0.8, 1), (Op.SHARPNESS, 0.9, 3)),
    ((Op.SHEAR_Y, 0.5, 8), (Op.TRANSLATE_Y, 0.7, 9)),
    ((Op.AUTOCONTRAST, 0.5, 8), (Op.EQUALIZE, 0.9, 2)),
    ((Op.SHEAR_Y, 0.2, 7), (Op.POSTERIZE, 0.3, 7)),
    ((Op.COLOR, 0.4, 3), (Op.BRIGHTNESS, 0.6, 7)),
    ((Op.SHARPNESS, 0.3, 9), (Op.BRIGHTNESS, 0.7, 9)),
    ((Op.EQUALIZE, 0.6, 5), (Op.EQUALIZE, 0.5, 1)),
    ((Op.CONTRAST, 0.6, 7), (Op.SHARPNESS, 0.6, 5)),
    ((Op.COLOR, 0.7, 7), (Op.TRANSLATE_X, 0.5, 8)),
    ((Op.EQUALIZE, 0.3, 7), (Op.AUTOCONTRAST, 0.4, 8)),
    ((Op.TRANSLATE_Y, 0.4, 3), (Op.SHARPNESS, 0.2, 6)),
    ((Op.BRIGHTNESS, 0.9, 6), (Op.COLOR, 0.2, 8)),
    ((Op.SOLARIZE, 0.5, 2), (Op.INVERT, 0.0, 3)),
    ((Op.EQUALIZE, 0.2, 0), (Op.AUTOCONTRAST, 0.6, 0)),
    ((Op.EQUALIZE, 0.2, 8), (Op.EQUALIZE, 0.8, 4)),
    ((Op.COLOR, 0.9, 9), (Op.EQUALIZE, 0.6, 6)),
    ((Op.AUTOCONTRAST, 0.8, 4), (Op.SOLARIZE, 0.2, 8)),
    ((Op.BRIGHTNESS, 0.1, 3), (Op.COLOR, 0.7, 0)),
    ((Op.SOLARIZE, 0.4, 5), (Op.AUTOCONTRAST, 0.9, 3)),
    ((Op.TRANSLATE_Y, 0.9, 9), (Op.TRANSLATE_Y, 0.7, 9)),
    ((Op.AUTOCONTRAST, 0.9, 2), (Op.SOLARIZE, 0.8, 3)),
    ((Op.EQUALIZE, 0.8, 8), (Op.INVERT, 0.1, 3)),
    ((Op.TRANSLATE_Y, 0.7, 9), (Op.AUTOCONTRAST, 0.9, 1)),
)

# Cubuk et al. 2020, "RandAugment" (arXiv:1909.13719): the 14 operations of section 3, two drawn independently and always applied, at
# magnitude 9 of 30 (torchvision's default; the paper's for ResNet-50 on ImageNet).
_RANDAUGMENT_OPS = [op for op in Op if op != Op.INVERT]
RANDAUGMENT: tuple[SubPolicy, ...] = tuple(((first, 1.0, 9), (second, 1.0, 9)) for first, second in product(_RANDAUGMENT_OPS, repeat=2))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Sub-policies as arrays [P, 2]: operation (int8), probability, fixed and signed part of the amount (float64)."""

    ops_P2: NDArray[np.int8]
    probabilities_P2: FloatArray
    fixed_P2: FloatArray
    signed_P2: FloatArray


@dataclass(frozen=True, kw_only=True)
class PolicyPlan:
    """What happens to each sample, on the host.

    Args:
        ops_S2: int8 [S, 2], `Op` codes of the first and second stage; 0 leaves the image alone.
        amounts_S2: float32 [S, 2], signed, in the unit `Op` gives for the operation; 0 where the operation is 0 or takes none.
    """

    ops_S2: NDArray[np.int8]
    amounts_S2: NDArray[np.float32]


def compile_policy(sub_policies: Sequence[SubPolicy], magnitudes: Magnitudes = MAGNITUDES) -> Policy:
    """The arrays of a list of sub-policies; their magnitude indices are those of `magnitudes`."""
    return Policy(
        ops_P2=np.array([[op for op, _, _ in pair] for pair in sub_policies], dtype=np.int8),
        probabilities_P2=np.array([[probability for _, probability, _ in pair] for pair in sub_policies]),
        fixed_P2=np.array([[magnitudes[op][0][index] for op, _, index in pair] for pair in sub_policies]),
        signed_P2=np.array([[magnitudes[op][1][index] for op, _, index in pair] for pair in sub_policies]),
    )


POLICY_TABLE: dict[str, Policy] = {
    "none": compile_policy([((Op.IDENTITY, 0.0, 0), (Op.IDENTITY, 0.0, 0))]),
    "autoaugment-cifar10": compile_policy(AUTOAUGMENT_CIFAR10),
    "randaugment": compile_policy(RANDAUGMENT, RANDAUGMENT_MAGNITUDES),
}


def draw_policy(policy: str, keys_S: KeyArray) -> PolicyPlan:
    """The plan of each sample, a pure function of its key.

    Args:
        policy: a name of `POLICY_TABLE`.
        keys_S: uint64 [S].

    Raises:
        ConfigError: the name is unknown; lists the known ones.
    """
    require_choice("policy", policy, tuple(POLICY_TABLE))
    table = POLICY_TABLE[policy]
    uniforms_S5 = uniforms(keys_S, 5)
    chosen_S = (uniforms_S5[:, 0] * len(table.ops_P2)).astype(np.int64)
    happens_S2 = uniforms_S5[:, 1:3] < table.probabilities_P2[chosen_S]
    signs_S2 = np.where(uniforms_S5[:, 3:5] < 0.5, -1.0, 1.0)
    amounts_S2 = table.fixed_P2[chosen_S] + signs_S2 * table.signed_P2[chosen_S]
    return PolicyPlan(
        ops_S2=table.ops_P2[chosen_S] * happens_S2,
        amounts_S2=np.where(happens_S2, amounts_S2, 0.0).astype(np.float32),
    )


def apply_policy(images_SHWC: torch.Tensor, plan: PolicyPlan) -> torch.Tensor:
    """The images after both stages of the plan; the input is left as it is. Never waits for the device.

    Args:
        images_SHWC: uint8 [S, H, W, 3].
        plan: of the same S samples.

    Returns:
        uint8 [S, H, W, 3] on the same device; the input itself where the plan is empty.

    Raises:
        ValueError: images and plan do not fit.
    """
    if images_SHWC.dtype != torch.uint8 or images_SHWC.ndim != 4 or images_SHWC.shape[-1] != 3:
        raise ValueError(f"a policy needs uint8 images [S, H, W, 3], not {images_SHWC.dtype} {list(images_SHWC.shape)}")
    if len(plan.ops_S2) != len(images_SHWC):
        raise ValueError(f"a plan for {len(plan.ops_S2)} samples cannot be applied to {len(images_SHWC)} images")
    if not plan.ops_S2.any():
        return images_SHWC
    # A batch on a CPU is changed image by image, which keeps an image in the cache; a device wants whole batches.
    return (apply_compiled if images_SHWC.device.type == "cpu" else apply_reference)(images_SHWC, plan)


def apply_compiled(images_SHWC: torch.Tensor, plan: PolicyPlan) -> torch.Tensor:
    """`apply_policy` for images on a CPU, by compiled loops in as many threads as torch may use."""
    _, height, width, _ = images_SHWC.shape
    numbers_S26 = np.empty((*plan.ops_S2.shape, 6))
    for stage, (ops_S, amounts_S) in enumerate(zip(plan.ops_S2.T, plan.amounts_S2.T, strict=True)):
        order_S = np.argsort(ops_S, kind="stable")
        numbers_S26[order_S, stage] = _numbers(_bounds(ops_S[order_S]), amounts_S[order_S].astype(np.float64), height, width)
    changed = images_SHWC.clone(memory_format=torch.contiguous_format)
    levels_SHWC: NDArray[np.uint8] = changed.numpy()
    in_shares(lambda first, last: apply_stages(levels_SHWC, plan.ops_S2, numbers_S26, first, last), len(changed), changed.nbytes)
    return changed


def apply_reference(images_SHWC: torch.Tensor, plan: PolicyPlan) -> torch.Tensor:
    """`apply_policy` in whole-batch torch operations, on any device."""
    device = images_SHWC.device
    # Sorting the batch by operation makes every kernel's rows one slice, known to the host; one gather a stage and one at the end.
    places_S = np.arange(len(images_SHWC))
    for ops_S, amounts_S in zip(plan.ops_S2.T, plan.amounts_S2.T, strict=True):
        order_S = np.argsort(ops_S, kind="stable")
        images_SHWC = images_SHWC.index_select(0, upload(places_S[order_S], device))
        _apply_sorted(images_SHWC, ops_S[order_S], amounts_S[order_S])
        places_S[order_S] = np.arange(len(images_SHWC))
    return images_SHWC.index_select(0, upload(places_S, device))


Kernel = Callable[[torch.Tensor, torch.Tensor, NDArray[np.int8]], torch.Tensor]

# First and last operation of each kernel, ascending, and the kernel: (images_RHWC, numbers_R6, ops_R) -> images_RHWC.
_KERNELS: tuple[tuple[Op, Op, Kernel], ...] = (
    (Op.SHEAR_X, Op.ROTATE, lambda images, numbers, _: warp(images, numbers)),
    (Op.INVERT, Op.EQUALIZE, remap),
    (Op.COLOR, Op.COLOR, lambda images, numbers, _: saturate(images, numbers[:, 3].float())),
    (Op.SHARPNESS, Op.SHARPNESS, lambda images, numbers, _: sharpen(images, numbers[:, 3].float())),
)


def _apply_sorted(images_SHWC: torch.Tensor, ops_S: NDArray[np.int8], amounts_S: NDArray[np.float32]) -> None:
    """One stage, in place, of images sorted by operation."""
    bounds = _bounds(ops_S)
    numbers_S6 = _numbers(bounds, amounts_S.astype(np.float64), images_SHWC.shape[1], images_SHWC.shape[2])
    device_numbers_S6 = upload(numbers_S6, images_SHWC.device)
    for first, last, kernel in _KERNELS:
        rows = slice(bounds[first], bounds[last + 1])
        if rows.start < rows.stop:
            images_SHWC[rows] = kernel(images_SHWC[rows], device_numbers_S6[rows], ops_S[rows])


def _bounds(ops_S: NDArray[np.int8]) -> list[int]:
    """Where the images of each operation begin, and the last ones end, when sorted by operation."""
    bounds: list[int] = np.searchsorted(ops_S, np.arange(len(Op) + 1)).tolist()
    return bounds


def _numbers(bounds: list[int], amounts_S: FloatArray, height: int, width: int) -> FloatArray:
    """What the kernels read, one row an image; the images of operation `op` are rows `bounds[op]` up to `bounds[op + 1]`.

    Returns:
        float64 [S, 6]: a matrix as `warp` wants it, or (threshold, mask, base, factor, 0, 0) for `remap` and the blends.
    """
    numbers_S6 = np.empty((len(amounts_S), 6))
    affine, others = slice(0, bounds[Op.ROTATE + 1]), slice(bounds[Op.INVERT], None)
    numbers_S6[affine] = (1, 0, 0, 0, 1, 0)
    numbers_S6[others] = (256, 255, 0, 1, 0, 0)
    for op, column, unit in (
        (Op.SHEAR_X, 1, 1),
        (Op.SHEAR_Y, 3, 1),
        (Op.TRANSLATE_X, 2, width),
        (Op.TRANSLATE_Y, 5, height),
        (Op.INVERT, 0, 0),
        (Op.SOLARIZE, 0, 1),
        *((enhance, 3, 1) for enhance in (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR, Op.SHARPNESS)),
    ):
        rows = slice(bounds[op], bounds[op + 1])
        numbers_S6[rows, column] = amounts_S[rows] * unit
    posterized, rotated = (slice(bounds[op], bounds[op + 1]) for op in (Op.POSTERIZE, Op.ROTATE))
    numbers_S6[posterized, 1] = 256 - np.exp2(8 - amounts_S[posterized])
    numbers_S6[rotated] = _rotations(amounts_S[rotated], height, width)
    # Pillow samples at pixel centres in 16.16 fixed point, the centre's shift rounded together with the translation.
    numbers_S6[affine, 2] += (numbers_S6[affine, 0] + numbers_S6[affine, 1]) / 2
    numbers_S6[affine, 5] += (numbers_S6[affine, 3] + numbers_S6[affine, 4]) / 2
    numbers_S6[affine] = np.floor(numbers_S6[affine] * 65536 + 0.5)
    return numbers_S6


def _rotations(degrees_R: FloatArray, height: int, width: int) -> FloatArray:
    """float64 [R, 6]: output-to-input matrices around the image's centre."""
    angles_R = -np.radians(degrees_R)
    # 15 decimals as Image.rotate keeps them, so that right angles are exact.
    cosine, sine = np.round(np.cos(angles_R), 15), np.round(np.sin(angles_R), 15)
    x, y = width / 2, height / 2
    return np.stack([cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y], axis=1)
