"""A sentence instead of a silent death when a mapped shard cannot be read any more.

Reading a mapped page that has no file behind it (the shard was cut short, its disk or server failed) makes the kernel send SIGBUS, which
ends the process. `SampleGuard` sees most such shards before a decoder does; this is for the moment in between. A handler in Python would
never run, because the failing instruction is repeated first; hence a compiled one that writes and exits.
"""

from __future__ import annotations

import ctypes
import signal
from pathlib import Path
from typing import Any

import numba
import numpy as np

_types: Any = numba.types  # without annotations of its own
_WRITE: Any = _types.ExternalFunction("write", _types.intp(_types.int32, _types.voidptr, _types.intp))
_EXIT: Any = _types.ExternalFunction("_exit", _types.void(_types.int32))
_STDERR = 2
EXIT_STATUS = 2
_kept: list[Any] = []  # the handler must outlive its installation


def explain_bus_errors(sentence: str) -> None:
    """From now on a bus error ends the process with `sentence` on standard error and exit status 2.

    Costs a third of a second, once. Replaces any handler there is, so it is for command lines, not for libraries.
    """
    text = np.frombuffer(f"\nerror: {sentence}\n".encode(), np.uint8)
    length = len(text)

    def handler(_signal: int) -> None:
        _WRITE(_STDERR, text.ctypes, length)
        _EXIT(EXIT_STATUS)

    compiled = numba.cfunc(_types.void(_types.int32))(handler)
    _kept.append(compiled)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(int(signal.SIGBUS), compiled.address)


def explain_bus_errors_of(root: Path | str) -> None:
    """`explain_bus_errors` for whatever reads the shards in folder `root`; of shards at a URL nothing is mapped."""
    if isinstance(root, Path):
        explain_bus_errors(
            f"a shard of {root}, or a decoded set kept for it (data.resident.cache), was cut short or its disk failed while it was read; "
            f"run 'python tools/verify_shards.py {root}', mend or remove what is damaged, and start again; training continues with --resume"
        )
