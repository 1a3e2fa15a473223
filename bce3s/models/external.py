"""Backbones from elsewhere: `timm:NAME`, and `package.module:factory` for any network of one's own.

A module from elsewhere stays what it is, its parameters under their own names. It must map images [V, 3, H, W] to features [V, D], which
is tried once while it is built: so a run does not fail at its first step, or hours later at its first evaluation.

Opening a run, or a checkpoint of it, imports the module that its config names: open only runs whose code you would run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from bce3s.models.backbone import Backbone, load_pretrained
from bce3s.models.from_timm import create_from_timm
from pipelines.config import did_you_mean
from pipelines.types import ConfigError

FORMS = ("timm:NAME", "package.module:factory")
_DEFAULT_SIDE_PX = 224


def build_external(arch: str, pretrained: str = "", image_sides: tuple[int, ...] = ()) -> Backbone:
    """Builds a network that is not of this package.

    Args:
        arch: of one of `FORMS`. The factory takes no arguments; a class does as well as a function.
        pretrained: path of a state dict, or "timm" for the weights that timm downloads; empty draws fresh ones.
        image_sides: px, of all images that it will be given, those of evaluation first; none is 224.

    Raises:
        ConfigError: a name that leads nowhere, a factory that fails, a network that cannot take such images or gives no features [V, D],
            or weights that are absent, damaged or do not fit.
        BackendError: timm is not installed.
    """
    sides = image_sides or (_DEFAULT_SIDE_PX,)
    library, _, name = arch.partition(":")
    if library == "timm":
        network = create_from_timm(name, pretrained, sides)
    else:
        network = _called(_factory(arch), arch)
    dims = {_feature_dim(network, side, arch) for side in sides}
    if len(dims) > 1:
        raise ConfigError(f"arch '{arch}' gives another number of features for images of another size; end it with a mean over the image")
    (feature_dim,), backbone = dims, cast(Backbone, network)
    if getattr(network, "feature_dim", None) != feature_dim:
        try:
            backbone.feature_dim = feature_dim
        except AttributeError:
            raise ConfigError(f"arch '{arch}' gives {feature_dim} features an image, and its own feature_dim says otherwise") from None
    if pretrained and library != "timm":
        # After the trial: a lazy layer has its weights only now.
        load_pretrained(network, Path(pretrained))
    return backbone


def _factory(arch: str) -> Callable[[], object]:
    module_name, _, name = arch.partition(":")
    # The console script, unlike `python -m`, does not look where it was started. Last, so that nothing installed is hidden.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever the code of that module does
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"arch '{arch}': there is no module '{error.name}'; start where it lies, or put its folder on PYTHONPATH"
            ) from None
        raise ConfigError(f"arch '{arch}': importing '{module_name}' failed: {_first_line(error)}") from error
    factory: Callable[[], object] | None = getattr(module, name, None) if name else None
    if not callable(factory):
        public = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        hint = did_you_mean(name, {known: f"{module_name}:{known}" for known in public})
        raise ConfigError(
            f"arch '{arch}': '{module_name}' has no callable '{name}'{hint or '; name a function or class that returns the network'}"
        )
    return factory


def _called(factory: Callable[[], object], arch: str) -> nn.Module:
    try:
        network = factory()
    except Exception as error:
        raise ConfigError(f"arch '{arch}' cannot be built: {_first_line(error)} (it is called without arguments)") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"arch '{arch}' gives an object of type {type(network).__name__}; it must return a torch.nn.Module")
    return network


def _feature_dim(network: nn.Module, side: int, arch: str) -> int:
    """D, by what the network makes of two images: attributes that should say it are wrong too often (MobileNetV3's in timm, say)."""
    was_training = network.training
    try:
        with torch.no_grad():
            features: object = network.eval()(torch.zeros(2, 3, side, side))
    except Exception as error:
        raise ConfigError(f"arch '{arch}' cannot take images of {side} px: {_first_line(error)}") from error
    finally:
        network.train(was_training)
    if not isinstance(features, Tensor):
        raise ConfigError(f"arch '{arch}' gives an object of type {type(features).__name__} for images; it must return one tensor [V, D]")
    if features.ndim != 2 or len(features) != 2 or not features.is_floating_point():
        raise ConfigError(
            f"arch '{arch}' gives {str(features.dtype).removeprefix('torch.')} {list(features.shape)} for 2 images of {side} px where "
            "float features [2, D] are needed; end it with a mean over the image, and leave its classifier out"
        )
    return features.shape[1]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ")
