"""Colour jitter equals Pillow's enhancements in their order, drawn per sample from counter keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from pipelines.augment.jitter import draw_jitter, jitter, jitter_reference
from pipelines.config import AugmentConfig, DataConfig
from pipelines.loaders import build_loader
from pipelines.order import INSTANCE, PARTNER
from pipelines.randomness import Purpose, derive_key, position_keys
from pipelines.types import Batch, ConfigError

STRENGTHS = (0.4, 0.4, 0.4)


def noise(count: int = 8, height: int = 37, width: int = 41) -> torch.Tensor:
    levels = np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    levels[0], levels[1] = 0, 255  # and images of one colour, where rounding of the mean shows
    levels[2] = levels[2] // 4
    return torch.from_numpy(levels)


def factors(count: int = 8) -> np.ndarray:
    drawn = np.random.default_rng(2).uniform(0, 2, (count, 3)).astype(np.float32)
    drawn[3], drawn[4] = 1, 0
    return drawn


def enhanced(pixels: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    image = ImageEnhance.Brightness(Image.fromarray(pixels)).enhance(brightness)
    image = ImageEnhance.Contrast(image).enhance(contrast)
    return np.asarray(ImageEnhance.Color(image).enhance(saturation))


@pytest.mark.parametrize("kernel", ["compiled", "reference"])
def test_jitter_equals_pillow(kernel: str) -> None:
    images, drawn = noise(), factors()
    before = images.clone()
    found = jitter(images, drawn) if kernel == "compiled" else jitter_reference(images, torch.from_numpy(drawn))
    assert torch.equal(images, before)
    for pixels, original, row in zip(found, images, drawn, strict=True):
        np.testing.assert_array_equal(pixels.numpy(), enhanced(original.numpy(), *row.tolist()))


def test_the_compiled_kernel_gives_the_bits_of_the_reference_at_every_size() -> None:
    for height, width in ((1, 1), (1, 5), (17, 3), (64, 64)):
        images = noise(8, height, width)
        torch.testing.assert_close(jitter(images, factors()), jitter_reference(images, torch.from_numpy(factors())), rtol=0, atol=0)


def test_factors_are_uniform_around_one_and_a_function_of_the_key() -> None:
    keys = position_keys(3, np.arange(20_000))
    drawn = draw_jitter(keys, (0.4, 1.5, 0.0))
    np.testing.assert_array_equal(draw_jitter(keys[7:9], (0.4, 1.5, 0.0)), drawn[7:9])
    for column, (low, high) in enumerate(((0.6, 1.4), (0.0, 2.5))):
        assert low <= drawn[:, column].min() < low + 0.01
        assert high - 0.01 < drawn[:, column].max() <= high
        assert abs(drawn[:, column].mean() - (low + high) / 2) < 0.02
    assert (drawn[:, 2] == 1).all()
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.03


def batches(make_shards: Any, loader: str, color_jitter: tuple[float, float, float], epoch: int = 1, start_step: int = 0) -> list[Batch]:
    augment = AugmentConfig(crop="pad", eval_crop=1.0, color_jitter=color_jitter)
    config = DataConfig(loader=loader, batch_size=16, image_size=32, num_threads=2, augment=augment)
    source = build_loader(make_shards(), "train", config, seed=0, device=torch.device("cpu"))
    found = list(source.epoch(epoch, start_step))
    source.close()
    return found


def test_every_loader_jitters_alike_and_resumes_alike(make_shards: Any) -> None:
    plain, dali, resident = (batches(make_shards, *made) for made in (("dali", (0, 0, 0)), ("dali", STRENGTHS), ("resident", STRENGTHS)))
    resumed = batches(make_shards, "resident", STRENGTHS, start_step=3)
    for one, other in zip(dali, resident, strict=True):
        assert torch.equal(one.images_SHWC, other.images_SHWC)
    for one, other in zip(resident[3:], resumed, strict=True):
        assert torch.equal(one.images_SHWC, other.images_SHWC)
    assert not torch.equal(plain[0].images_SHWC, dali[0].images_SHWC)
    assert (plain[0].ids_S == dali[0].ids_S).all()


def test_without_strength_nothing_is_drawn_and_nothing_else_changes(make_shards: Any) -> None:
    """The jitter's keys are its own: switching it on must not move crops, flips or mixing."""
    plain, jittered = (batches(make_shards, "synthetic", strengths) for strengths in ((0.0, 0.0, 0.0), STRENGTHS))
    for one, other in zip(plain, jittered, strict=True):
        assert one.mix is not None
        assert other.mix is not None
        assert torch.equal(one.mix, other.mix)
    white = [batches(make_shards, "resident", (0.0, 0.0, strength))[0].images_SHWC for strength in (0.0, 1e-9)]
    assert torch.equal(white[0], white[1])


def test_factors_are_planned_from_keys_of_their_own(make_shards: Any) -> None:
    """Keys shared with the crop would tie an image's brightness to its flip."""
    shards = make_shards()
    source = build_loader(
        shards, "train", DataConfig(loader="synthetic", augment=AugmentConfig(color_jitter=STRENGTHS)), seed=5, device=torch.device("cpu")
    )
    plan = next(source._plans(3, 1))
    keys = [position_keys(derive_key(5, 3, stream, Purpose.JITTER), np.arange(64, 74)) for stream in (INSTANCE, PARTNER)]
    np.testing.assert_array_equal(plan.jitter_S3, draw_jitter(np.concatenate(keys), STRENGTHS))
    source.close()


@pytest.mark.parametrize("strengths", [(0.4, 0.4), (0.4, 0.4, -0.1), (0.4, float("inf"), 0.0)])
def test_strengths_that_cannot_be_are_one_sentence(strengths: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="color_jitter takes three strengths of 0 or more"):
        replace(AugmentConfig(), color_jitter=strengths)


@pytest.mark.cuda
def test_jitter_on_a_device_equals_the_host() -> None:
    images, drawn = noise(), factors()
    torch.testing.assert_close(jitter(images.cuda(), drawn).cpu(), jitter(images, drawn), rtol=0, atol=0)
