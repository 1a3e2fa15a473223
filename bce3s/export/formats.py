"""What a network can be written as. A new format is one file with a `Format`, and one line in `FORMATS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines.config import require, require_choice
from pipelines.types import BackendError

if TYPE_CHECKING:
    from torch import Tensor

    from bce3s.export.plain import Export

FORMATS: dict[str, str] = {
    "safetensors": "bce3s.export.inference_weights:FORMAT",
    "onnx": "bce3s.export.onnx_graph:FORMAT",
    "torchscript": "bce3s.export.torchscript:FORMAT",
    "torchvision-state-dict": "bce3s.export.torchvision_names:FORMAT",
    "timm": "bce3s.export.timm_folder:FORMAT",
}


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """What a format that stores the computation can be asked for.

    Args:
        preprocess: the graph takes cropped pixels, uint8 [B, H, W, 3], and normalises them itself.
        opset: version of ONNX's operators; 0 is the format's own choice.
        dynamic_size: height and width are free too, not the batch alone.
    """

    preprocess: bool = False
    opset: int = 0
    dynamic_size: bool = False


class Opened(NamedTuple):
    """An exported file, opened by a program that did not write it.

    Args:
        run: from a batch (as the format takes it) to logits [B, K].
        reader: what that program is, for the report.
    """

    run: Callable[[Tensor], Tensor]
    reader: str


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write a network.

    Args:
        encode: the files by name, whole, in memory; the name "" is the file of a format that is a single one. Raises `ConfigError` where
            the network cannot be expressed.
        open: reads the file or folder back with code that is not the exporter's; given what was exported too.
        usage: Python that loads it, for the model card; given what was exported and the name of the file.
        suffix: of the single file; "" is a folder.
        options: of `GraphOptions`, which it knows.
        packages: it needs beside torch.
        extra: of this project's, that installs them.
    """

    encode: Callable[[Export, GraphOptions], dict[str, bytes]]
    open: Callable[[Path, Export], Opened]
    usage: Callable[[Export, GraphOptions, str], str]
    suffix: str
    options: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    extra: str = ""


def load_format(name: str, options: GraphOptions) -> Format:
    """The format of that name, which knows all that is asked of it.

    Raises:
        ConfigError: an unknown name, or an option it does not know.
        BackendError: a package it needs is not installed.
    """
    require_choice("format", name, tuple(FORMATS))
    module, attribute = FORMATS[name].split(":")
    found: Format = getattr(import_module(module), attribute)
    for field in fields(options):
        asked = getattr(options, field.name) != field.default
        option = field.name.replace("_", "-")
        require(not asked or field.name in found.options, f"--{option} says nothing to --format {name}: leave it out")
    for package in found.packages:
        try:
            import_module(package)
        except ImportError as error:
            sentence = f"--format {name} needs {package}, which cannot be imported ({error}); pip install 'bce3s[{found.extra}]'"
            raise BackendError(sentence) from error
    return found
