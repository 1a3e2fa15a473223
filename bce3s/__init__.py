"""From device batches to gradients: the BCE3S trainer for long-tailed recognition."""

import pipelines

if getattr(pipelines, "__project__", None) != "bce3s":
    raise ImportError(
        f"the package 'pipelines' at {getattr(pipelines, '__path__', ['?'])[0]} is not bce3s's own; "
        "another distribution of that name shadows it: run 'pip uninstall pipelines' and 'pip install -e .' again"
    )

__all__ = ["__version__"]
__version__ = "0.1.0"
