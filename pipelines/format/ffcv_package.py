"""The one way FFCV is imported: it is optional, from 2023, and changes settings of the process when it is."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

from pipelines.types import BackendError


def import_ffcv(module: str, user: str) -> Any:
    """Imports `module` of FFCV, which takes seconds the first time.

    Args:
        module: dotted name.
        user: what needs it, as the sentence begins: "a .beton file".

    Raises:
        BackendError: it cannot be imported; says how to install it.
    """
    import numba
    import torch

    num_threads = torch.get_num_threads(), numba.get_num_threads()
    # Filters belong to the process. FFCV warns of what has changed since it was written.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return import_module(module)
        except (ImportError, OSError) as error:  # OSError: a shared library is missing
            raise BackendError(
                f"{user} needs FFCV, which cannot be imported here ({error}); run \"pip install 'bce3s[ffcv]'\", "
                "on Debian and Ubuntu after 'apt-get install pkg-config libturbojpeg0-dev libopencv-dev'"
            ) from error
        finally:
            # FFCV sets both to 1 on import, for the whole process: a CPU run would go on with one thread.
            torch.set_num_threads(num_threads[0])
            numba.set_num_threads(num_threads[1])
