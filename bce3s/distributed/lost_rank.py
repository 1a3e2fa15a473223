"""A rank that died or hangs, seen from the others: torch.distributed's errors told apart from those of the program."""

from __future__ import annotations

import re

import torch.distributed as dist

from pipelines.types import UserError

# What gloo and NCCL say of a peer that closed its connection, was killed, or did not answer in time. gloo raises a bare RuntimeError with
# the path of its own source in it; NCCL's errors carry the name of their code.
_SIGNS = re.compile(
    r"gloo/transport|Connection (?:closed|reset|refused)|Broken pipe|remote (?:worker|process)|ncclRemoteError"
    r"|NCCL communicator was aborted|collective operation timeout"
)


class LostRankError(UserError):
    """Another rank died or does not answer; training goes on from the last checkpoint."""

    @classmethod
    def of(cls, error: BaseException) -> LostRankError:
        """The sentence for an error that `is_lost_rank` knows."""
        reason = re.sub(r"\[\S+?\.(?:cc|cpp):\d+\] ", "", str(error).strip().split("\n")[0]).split(". ")[0].rstrip(".")
        return cls(f"another rank ended or does not answer ({reason}); see what it printed, then start all ranks again with --resume")


def is_lost_rank(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, means that another rank died or does not answer."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, LostRankError | dist.DistNetworkError | dist.DistStoreError):
            return True
        if isinstance(seen, RuntimeError) and _SIGNS.search(str(seen)):
            return True
        seen = seen.__cause__
    return False
