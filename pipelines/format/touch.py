"""Looks at encoded images where they lie in the mapped tars, a whole batch in one compiled loop: read ahead, and seen to be whole."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import extending
from numpy.typing import NDArray

from pipelines.types import IntArray

_PAGE = 4096
_WILLNEED = 3
_types: Any = numba.types  # without annotations of its own
_MADVISE: Any = _types.ExternalFunction("madvise", _types.int32(_types.intp, _types.intp, _types.int32))
_carray: Any = vars(numba)["carray"]


def _pointer(typing_context: Any, address: Any) -> Any:
    def convert(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return _types.CPointer(_types.uint8)(_types.intp), convert


_bytes_at: Any = extending.intrinsic(_pointer)  # an address as a pointer to bytes


@numba.njit(cache=True, nogil=True)
def read_ahead(addresses_S: IntArray, sizes_S: NDArray[np.uint32]) -> None:
    """Asks the kernel to read the pages of these mapped ranges; returns at once.

    Args:
        addresses_S: int64 [S].
        sizes_S: uint32 [S], bytes.
    """
    for i in range(len(addresses_S)):
        start = addresses_S[i] & ~np.int64(_PAGE - 1)
        _MADVISE(start, addresses_S[i] + np.int64(sizes_S[i]) - start, _WILLNEED)


@numba.njit(cache=True, nogil=True)
def have_ends(addresses_S: IntArray, sizes_S: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which images begin and end as a JPEG or a PNG does: bool [S].

    What cutting, zeros and overwriting leave behind mostly does not; a false one may still be whole, with bytes after its end.

    Args:
        addresses_S: int64 [S], mapped and backed by the file.
        sizes_S: uint32 [S], bytes.
    """
    whole = np.zeros(len(addresses_S), np.bool_)
    for i in range(len(addresses_S)):
        size = np.int64(sizes_S[i])
        if size < 4:
            continue
        image = _carray(_bytes_at(addresses_S[i]), size)
        is_jpeg = image[0] == 0xFF and image[1] == 0xD8 and image[size - 2] == 0xFF and image[size - 1] == 0xD9
        is_png = image[0] == 0x89 and image[1] == 0x50 and image[size - 2] == 0x60 and image[size - 1] == 0x82
        whole[i] = is_jpeg or is_png
    return whole
