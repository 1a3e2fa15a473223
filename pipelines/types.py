"""The words the rooms share: samples, batches, loaders, and the errors a user can cause.

Suffix letters name the axes of an array or tensor, here and in `bce3s`:

    B  batch: source images of one step     S  samples decoded for one step: 2B in training (instance, then partner), B in evaluation
    H W C  image                            V  views of one step (3B rows: source, mixup, cutmix)
    K  classes   D  feature dimension       P  projection dimension       N  samples of a split

Errors, each one sentence that names the path and the next step:

    UserError (ValueError)
    ├── ConfigError    an option, name or value that cannot work
    ├── DatasetError   the source images or lists
    ├── ShardError     the shards on disk
    │   └── DamagedSampleError   samples that do not decode any more; training may go on without them
    └── BackendError   an optional package or device that is missing
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

IntArray = NDArray[np.int64]
JsonValue = Any
SPLITS = ("train", "val", "test")


class UserError(ValueError):
    """Something the user can mend; command lines print it as one sentence and exit with status 2."""


class ConfigError(UserError):
    """An option, name or value that cannot work."""


class DatasetError(UserError):
    """The source images or lists are not what the data set expects."""


class ShardError(UserError):
    """The shards on disk are missing, damaged, or of another version."""


class DamagedSampleError(ShardError):
    """Samples that decoded when the shards were made and do not any more.

    Args:
        message: the sentence; names up to five of them.
        ids: int64, their positions in the split's index, at least one.
    """

    def __init__(self, message: str, ids: IntArray) -> None:
        """Keeps the ids for whoever goes on without them."""
        super().__init__(message)
        self.ids = ids


class BackendError(UserError):
    """An optional package or a device is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """One image as bytes on disk. `extension` is "jpg" or "png"; `source` names the origin in messages (a path, or file#row)."""

    encoded: bytes
    extension: str
    label: int
    source: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a data set, not yet decoded.

    Args:
        labels_N: int64 [N], 0 ≤ label < K.
        sources: N names for messages (a path, file#row, archive!member), what `EncodedSample.source` of sample i will say.
        read: gives sample i; called from several threads and forked processes at once, so it holds no open file that has a position.
            Raises `DatasetError` naming the file where it cannot be read. Not called where the data set has a `stream`.
    """

    labels_N: IntArray
    sources: Sequence[str]
    read: Callable[[int], EncodedSample]


@dataclass(frozen=True, kw_only=True)
class OpenDataset:
    """A data set ready to be sharded.

    Args:
        name: its entry in `DATASETS`.
        class_names: K names; label k is class_names[k].
        splits: each of `SPLITS` -> a `Split`, which may be empty (N = 0).
        options: what it was opened with, for the manifest.
        stream: where the source can only be read from front to back (a compressed archive): yields (split, i, sample) for every sample of
            every split once, in the source's own order; None where `Split.read` takes samples in any order.
        complaints: sentences on what is unlike the published data set (another number of images, say) but can be worked with.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    stream: Callable[[], Iterator[tuple[str, int, EncodedSample]]] | None = None
    complaints: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's input, on the device.

    Args:
        images_SHWC: uint8 [S, H, W, 3], cropped and flipped; rows 0…B−1 are the instance stream, B…2B−1 the partner stream (training only).
        labels_S: int64 [S], on the same device.
        ids_S: int64 [S], on the host: positions in the split's index.
        mix: float32 [6] on the device, `(lam_mixup, lam_cutmix, y0, y1, x0, x1)`; None in evaluation.
        epoch, step: where in the order this batch stands (step counts from 0 within the epoch).
    """

    images_SHWC: torch.Tensor
    labels_S: torch.Tensor
    ids_S: IntArray
    mix: torch.Tensor | None
    epoch: int
    step: int

    @property
    def num_sources(self) -> int:
        """B: images of the instance stream."""
        return len(self.ids_S) // 2 if self.mix is not None else len(self.ids_S)


class Loader(Protocol):
    """What every entry of `LOADERS` delivers: the same ids in the same order, whatever decodes them."""

    num_steps: int

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of `epoch` from `start_step` on. Starting one ends the one before."""
        ...

    def close(self) -> None:
        """Frees threads and buffers; the loader cannot be used afterwards."""
        ...
