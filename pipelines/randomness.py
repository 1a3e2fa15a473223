"""Counter-based random numbers: every draw is a pure function of a key, so worker count, backend and resume cannot change it.

A key is 64 bits, made from (seed, epoch, stream, purpose, position). The mixer is SplitMix64's finaliser
(Steele, Lea and Flood 2014), the same on every platform and library version, and cheap for one key as for a million.
"""

from __future__ import annotations

import enum

import numba
import numpy as np
from numpy.typing import NDArray

from pipelines.types import IntArray

KeyArray = NDArray[np.uint64]
FloatArray = NDArray[np.float64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTOR_1 = 0xBF58476D1CE4E5B9
_FACTOR_2 = 0x94D049BB133111EB


class Purpose(enum.IntEnum):
    """What a key is drawn for. Values are part of the order contract: never renumber, only append."""

    ORDER = 1
    CROP = 2
    POLICY = 3
    CUTOUT = 4
    MIX = 5
    CLASS_SUBSET = 6
    SYNTHETIC = 7
    SHARD_ORDER = 8
    RESAMPLING = 9
    JITTER = 10


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _FACTOR_1) & _MASK
    value = ((value ^ (value >> 27)) * _FACTOR_2) & _MASK
    return value ^ (value >> 31)


def derive_key(seed: int, *path: int) -> int:
    """One 64-bit key for `seed` and the integers of `path`, such as (epoch, stream, purpose)."""
    key = _mix(seed & _MASK)
    for part in path:
        key = _mix((key + _GOLDEN * ((part & _MASK) + 1)) & _MASK)
    return key


def _mix_array(values: KeyArray) -> KeyArray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FACTOR_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_FACTOR_2)
    return values ^ (values >> np.uint64(31))


def position_keys(base_key: int, positions_N: IntArray) -> KeyArray:
    """uint64 [N]: one key per position under `base_key`."""
    counters = (positions_N.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return _mix_array(counters + np.uint64(base_key))


def uniforms(keys: KeyArray, count: int) -> FloatArray:
    """float64 [..., count] in [0, 1): `count` numbers for each key of any shape."""
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = _mix_array(keys[..., None] + counters) >> np.uint64(11)
    return bits.astype(np.float64) * (1.0 / (1 << 53))


@numba.njit(cache=True)
def mix_word(value: np.uint64) -> np.uint64:
    """The mixer for one uint64, for compiled loops; equal to `_mix` and `_mix_array`."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_FACTOR_1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_FACTOR_2)
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True)
def uniform_at(key: np.uint64, counter: int) -> float:
    """float64 in [0, 1): number `counter` (from 0) of `key`, for compiled loops; equal to `uniforms(key, counter + 1)[counter]`."""
    bits = mix_word(key + np.uint64(counter + 1) * np.uint64(_GOLDEN)) >> np.uint64(11)
    return np.float64(bits) * (1.0 / 9007199254740992.0)


@numba.njit(cache=True)
def key_at(base_key: np.uint64, position: int) -> np.uint64:
    """One key of `position_keys`, for compiled loops."""
    return mix_word(np.uint64(position + 1) * np.uint64(_GOLDEN) + base_key)


@numba.njit(cache=True)
def _fisher_yates(key: np.uint64, count: int) -> IntArray:
    order = np.arange(count)
    for last in range(count - 1, 0, -1):
        # 53 bits are far more than any data set has samples, so the bias of this reduction is below 1e-9.
        chosen = np.int64(uniform_at(key, last - 1) * (last + 1))
        order[last], order[chosen] = order[chosen], order[last]
    return order


def permutation(key: int, count: int) -> IntArray:
    """int64 [count]: 0…count−1 shuffled by `key`."""
    shuffled: IntArray = _fisher_yates(np.uint64(key), count)
    return shuffled
