"""Reads the pickles of CIFAR's python version without running what a forged one might hold."""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.types import DatasetError


def _dtype(spec: bytes | str, align: int, copy: int) -> np.dtype[Any]:
    # Python 2 wrote 0 and 1 where NumPy now warns unless it gets booleans.
    return np.dtype(spec if isinstance(spec, str) else spec.decode("ascii"), align=bool(align), copy=bool(copy))


# NumPy's own rebuilding function, under the two module paths that old and new versions write.
_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): codecs.encode,
}


class _Refused(Exception):
    """Carries the name of the global that was refused."""


class _CifarUnpickler(pickle.Unpickler):
    """Knows only the names that CIFAR's files need."""

    def find_class(self, module_name: str, global_name: str, /) -> Callable[..., Any]:
        """Raises `_Refused` for every global that is not admitted."""
        try:
            return _ADMITTED[module_name, global_name]
        except KeyError:
            raise _Refused(f"{module_name}.{global_name}") from None


def load_cifar_pickle(path: Path) -> dict[bytes, Any]:
    """Loads one file of CIFAR's python version; its keys are bytes (Python 2 strings).

    Raises:
        DatasetError: the file cannot be read, is damaged, asks for a global that CIFAR does not need, or holds no dictionary.
    """
    try:
        with path.open("rb") as file:
            content = _CifarUnpickler(file, encoding="bytes").load()
    except _Refused as refused:
        raise DatasetError(f"{path} asks for '{refused}', which no CIFAR file needs: delete it and download it again") from None
    # A damaged pickle can raise nearly anything: EOFError, UnpicklingError, KeyError, TypeError, MemoryError, …
    except Exception as error:
        raise DatasetError(f"{path} is damaged or cut short ({type(error).__name__}): delete it and unpack the archive again") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} holds no dictionary, so it is not a CIFAR file: delete it and unpack the archive again")
    return content
