"""Whether an exported file computes what the trained network does: logits side by side, on real images where there are any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bce3s.checkpoint import require_same_data
from bce3s.export.formats import Opened
from bce3s.export.plain import Export
from bce3s.train import shards_of, with_loader_for
from pipelines.augment.mix import channel_statistics, normalise
from pipelines.format import ShardSet
from pipelines.loaders import build_loader
from pipelines.types import UserError

BATCH_SIZES = (1, 7, 56)
"""One image, an odd number, and the rest: a batch size that was baked in fails at two of them."""
TOLERANCE = 2e-4
"""Largest difference of two logits, as a share of their standard deviation over images and classes.

Other memory layouts, fused operations and orders of sums gave up to 4e-5 (ResNet-101 with random weights); weights rounded to float16 give
2e-3 on a ResNet-8, to bfloat16 5e-2, so either is told from them.
"""
_PLACES = 8


class Images(NamedTuple):
    """What the logits are compared on.

    Args:
        pixels: cropped as in evaluation, uint8 [N, H, W, 3].
        what: "images of the test split", or "images of random pixels".
        why_random: a sentence; empty where they are real.
    """

    pixels: Tensor
    what: str
    why_random: str = ""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the logits of an exported file lie from those of the trained network in float32.

    Args:
        max_difference: largest absolute difference of two logits; infinite where one is not finite or the file does not run.
        tolerance: what it may be.
        equal_top1: share of images with the same arg max, in [0, 1].
        num_images: compared.
        images, why_random: what they are, as in `Images`.
        reader: what computed the file's logits.
        fault: why it did not run; empty where it did.
    """

    max_difference: float
    tolerance: float
    equal_top1: float
    num_images: int
    images: str
    why_random: str = ""
    reader: str
    fault: str = ""

    @property
    def holds(self) -> bool:
        """Whether the difference is tolerable."""
        return self.max_difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, where there is no infinity."""
        return {**asdict(self), "max_difference": self.max_difference if np.isfinite(self.max_difference) else None}

    def sentence(self) -> str:
        """For people; of what anybody may know, so without `why_random`, which names places on this machine."""
        if self.fault:
            return f"{self.reader} does not run it: {self.fault}"
        return (
            f"logits differ by at most {self.max_difference:.2g} (tolerance {self.tolerance:.2g}) and top-1 is equal for "
            f"{self.equal_top1:.1%} of {self.num_images} {self.images}, read by {self.reader}"
        )


def parity_images(export: Export, location: str | None) -> Images:
    """Images of the test split, of val where there is none, spread over it; random pixels where the shards of the run are not there.

    Args:
        export: whose run says where its shards are, and how images are cropped.
        location: shards instead; must be those of the run.

    Raises:
        UserError: `location` was given and does not hold them.
    """
    try:
        if location is None and export.trained.run is None:
            raise UserError("the checkpoint lies outside of a run")
        shards = shards_of(export.trained.run or Path(), location)
        require_same_data(export.trained.state, export.trained.path, shards.dataset, shards.fingerprint, shards.root)
        return _of_split(export, shards)
    except UserError as error:
        if location is not None:
            raise
        side = export.image_size
        pixels = torch.randint(0, 256, (sum(BATCH_SIZES), side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return Images(pixels, "images of random pixels", str(error))


def _of_split(export: Export, shards: ShardSet) -> Images:
    split = "test" if shards.num_samples("test") else "val"
    config = with_loader_for(export.trained.config, shards).data
    if isinstance(shards.root, Path):
        config = replace(config, loader="dali")  # decodes what is asked for, and not the whole split first
    config = replace(config, batch_size=sum(BATCH_SIZES) // _PLACES, prefetch_batches=1)
    loader = build_loader(shards, split, config, seed=0, device=torch.device("cpu"), training=False)
    # Splits are sorted by class: a few images from each of several places show more classes than many from the front.
    steps = np.unique(np.linspace(0, loader.num_steps - 1, _PLACES).round().astype(np.int64))
    pixels = torch.cat([next(iter(loader.epoch(0, start_step=int(step)))).images_SHWC.clone() for step in steps])
    loader.close()
    return Images(pixels, f"images of the {split} split")


@torch.inference_mode()
def compare(export: Export, opened: Opened, images: Images, *, takes_pixels: bool) -> Parity:
    """Runs the trained network, in float32 whatever it was trained in, and the exported one, at several batch sizes.

    Args:
        export: what was exported; its `trained` network runs where it lies.
        opened: the file.
        images: to compare on.
        takes_pixels: the file takes uint8 [B, H, W, 3] in place of normalised images.
    """
    device, cpu = export.trained.placement.device, torch.device("cpu")
    on_device, on_cpu = (channel_statistics(export.augment, place) for place in (device, cpu))
    ours, theirs, fault = [], [], ""
    for pixels in images.pixels.split(_sizes(len(images.pixels))):
        with _full_precision():
            ours.append(export.trained.model(normalise(pixels.to(device), *on_device, torch.float32)).float().cpu())
        try:
            batch = pixels if takes_pixels else normalise(pixels, *on_cpu, torch.float32).contiguous()
            theirs.append(opened.run(batch).float())
        except Exception as error:  # ONNX Runtime and TorchScript each have their own kinds
            fault = fault or f"at batch size {len(pixels)}, {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    found = _Logits(torch.cat(ours), None if fault else torch.cat(theirs))
    if found.theirs is not None and found.theirs.shape != found.ours.shape:
        fault = f"its logits have shape {list(found.theirs.shape)}, not {list(found.ours.shape)}"
    return Parity(
        max_difference=float("inf") if fault else found.max_difference(),
        tolerance=found.allowed(),
        equal_top1=0.0 if fault else found.equal_top1(),
        num_images=len(images.pixels),
        images=images.what,
        why_random=images.why_random,
        reader=opened.reader,
        fault=fault,
    )


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32: 10 bits of mantissa differ from float32 by more than any tolerance here."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _sizes(num_images: int) -> list[int]:
    """`BATCH_SIZES` as far as there are images."""
    sizes = np.diff(np.minimum(np.cumsum(BATCH_SIZES), num_images), prepend=0)
    return [int(size) for size in sizes if size]


class _Logits(NamedTuple):
    """Of the trained network [N, K], and of the file where it ran."""

    ours: Tensor
    theirs: Tensor | None

    def max_difference(self) -> float:
        assert self.theirs is not None
        found = float((self.ours.double() - self.theirs.double()).abs().max())
        return found if np.isfinite(found) else float("inf")

    def equal_top1(self) -> float:
        assert self.theirs is not None
        return float((self.ours.argmax(1) == self.theirs.argmax(1)).double().mean())

    def allowed(self) -> float:
        """The spread says what a difference means; rounding of the largest logit, which no small spread excuses, is allowed in any case."""
        return max(TOLERANCE * float(self.ours.std(correction=0)), 16 * torch.finfo(torch.float32).eps * float(self.ours.abs().max()))
