"""Samples that decoded when the shards were made and do not any more: found before a decoder sees them, or named after one failed."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.format.reader import ByteArray, ShardSplit
from pipelines.format.touch import have_ends
from pipelines.types import BackendError, DamagedSampleError, IntArray, ShardError, UserError

Decodes = Callable[[ByteArray], bool]
_ADVICE = "the shard is damaged: copy it again or make the shards again"


class SampleGuard:
    """Looks at a batch of encoded images before a decoder does, because DALI may crash on what it cannot decode (docs/log.md).

    Costs two compiled reads a sample and one stat(2) a shard. Damage in the middle of an image is left to the decoder.
    """

    def __init__(self, split: ShardSplit) -> None:
        """Nothing has been looked at yet."""
        self._split = split
        self._cleared_N = np.zeros(len(split), np.bool_)  # whole, though they do not end as images do

    def require_whole(self, ids_S: IntArray) -> None:
        """Raises unless the images of int64 [S] ids can be handed to a decoder.

        Raises:
            DamagedSampleError: some have lost their beginning or end, and a full decode says so too.
            ShardError: a shard has become shorter.
        """
        split = self._split
        gone = split.shrunken(ids_S)
        if len(gone):
            path = split.paths[int(split.shards_N[gone[0]])]
            raise ShardError(f"shard {path} was cut short while it was read; copy it again and continue with --resume")
        doubtful = np.unique(ids_S[~have_ends(split.addresses(ids_S), split.sizes_N[ids_S])])
        doubtful = doubtful[~self._cleared_N[doubtful]]
        if not len(doubtful):
            return
        damaged = undecodable(split, doubtful)
        self._cleared_N[np.setdiff1d(doubtful, damaged)] = True
        if len(damaged):
            raise damaged_samples(split, damaged)


def damaged_samples(split: ShardSplit, ids: IntArray) -> DamagedSampleError:
    """The error that names the first five of int64 `ids`."""
    return DamagedSampleError(damage_sentence([split.describe(int(i)) for i in ids[:5]], len(ids), _ADVICE), ids)


def damage_sentence(named: list[str], count: int, advice: str) -> str:
    """What is wrong with `count` samples, of which some are named, and what to do."""
    others = f" and {count - len(named)} more" if count > len(named) else ""
    return f"{', '.join(named)}{others} {'does' if count == 1 else 'do'} not decode; {advice}"


def undecodable(split: ShardSplit, ids: IntArray, decodes: Decodes | None = None) -> IntArray:
    """Those of int64 `ids` that Pillow cannot decode to the size the index says; where it can decode all, those that `decodes` cannot."""
    images = list(zip(ids.tolist(), split.encoded(ids), strict=True))
    damaged = [i for i, encoded in images if pillow_pixels(encoded, int(split.heights_N[i]), int(split.widths_N[i])) is None]
    if decodes is not None and not damaged:
        damaged = [i for i, encoded in images if not decodes(encoded)]
    return np.array(damaged, np.int64)


def pillow_pixels(encoded: ByteArray, height: int, width: int) -> NDArray[np.uint8] | None:
    """uint8 [height, width, 3]; None if it does not decode to that size."""
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            if image.size != (width, height):
                return None  # a damaged header can ask for gigabytes
            return np.asarray(image.convert("RGB"))
    except Exception:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, DecompressionBombError and more
        return None


def explain_failure(error: RuntimeError, split: ShardSplit, ids: IntArray, decodes: Decodes | None = None) -> UserError:
    """The user's error for DALI's, which does not say which sample failed: those of `ids` that do not decode are named.

    Args:
        error: DALI's.
        split: of the samples.
        ids: int64, of those in flight.
        decodes: asked where Pillow decodes all of them, because decoders differ in what they tolerate.
    """
    damaged = undecodable(split, ids, decodes)
    if len(damaged):
        return damaged_samples(split, damaged)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[lines.index("encountered:") + 1] if "encountered:" in lines[:-1] else lines[0]
    return BackendError(f"DALI failed while decoding: {reason}")


def tiny_jpeg() -> ByteArray:
    """A JPEG of 64 × 64 pixels, uint8 [bytes], to start decoders with."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    return np.frombuffer(buffer.getvalue(), np.uint8)
