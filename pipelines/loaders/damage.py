"""Samples that decoded when the shards were made and do not any more: found before a decoder sees them, or named after one failed."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipelines.format.reader import ByteArray, ShardSplit
from pipelines.format.touch import have_ends
from pipelines.types import BackendError, DamagedSampleError, IntArray, ShardError, UserError

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
    return DamagedSampleError(f"{', '.join(split.describe(int(i)) for i in ids[:5])} does not decode; {_ADVICE}", ids)


def undecodable(split: ShardSplit, ids: IntArray) -> IntArray:
    """Those of int64 `ids` that Pillow cannot decode."""
    return np.array([i for i, encoded in zip(ids.tolist(), split.encoded(ids), strict=True) if not _decodes(encoded)], np.int64)


def _decodes(encoded: ByteArray) -> bool:
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def explain_failure(error: RuntimeError, split: ShardSplit, ids: IntArray) -> UserError:
    """The user's error for DALI's, which does not say which sample failed: those of `ids` that do not decode on the host are named."""
    damaged = undecodable(split, ids)
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
