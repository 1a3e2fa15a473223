"""The one way DALI is imported: a missing one is a sentence, whoever needs it first."""

from __future__ import annotations

from pipelines.types import BackendError

try:
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]
except ImportError as error:
    raise BackendError(
        f"this loader needs NVIDIA DALI, which cannot be imported here ({error}); "
        "run 'pip install nvidia-dali-cuda130', or take --loader ffcv, which needs shards with betons"
    ) from error

__all__ = ["Pipeline", "ReleaseUnusedMemory", "fn", "types"]
