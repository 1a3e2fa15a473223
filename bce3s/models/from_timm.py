"""Networks of timm (PyTorch Image Models, Wightman 2019) without their classifiers, with weights from a file or from timm's own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bce3s.models.backbone import WeightShapeError, load_pretrained
from pipelines.config import did_you_mean
from pipelines.types import BackendError, ConfigError

DOWNLOADED = "timm"
"""As `ModelConfig.pretrained`: the weights that timm itself has for this name, downloaded once."""


def create_from_timm(name: str, pretrained: str, image_sides: tuple[int, ...]) -> nn.Module:
    """A network of timm that gives pooled features.

    Args:
        name: as `timm.list_models` has it, with a tag of its weights or without: convnext_tiny, convnext_tiny.in12k_ft_in1k.
        pretrained: path of a state dict in timm's names, `DOWNLOADED`, or empty. A table of positions in the file is resized.
        image_sides: px; a network of fixed size is built for the first, and told to resize its positions where there are several.

    Raises:
        ConfigError: unknown name or tag, weights that cannot be had or do not fit, or a network that cannot be built for such images.
        BackendError: timm is not installed, or cannot be imported.
    """
    timm = _imported()
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise ConfigError(f"timm has no model '{base}'{did_you_mean(base, timm.list_models()) or '; timm.list_models() lists them'}")
    facts = timm.get_pretrained_cfg(base)
    options: dict[str, Any] = {"num_classes": 0}
    if facts is not None and facts.fixed_input_size:
        options["img_size"] = image_sides[0]
        if len(set(image_sides)) > 1:
            options["dynamic_img_size"] = True
    if pretrained == DOWNLOADED:
        return _created(timm, name, options, "its weights cannot be had; name a file that has them with --set model.pretrained=PATH")
    network = _created(timm, name, options)
    if pretrained:
        try:
            load_pretrained(network, Path(pretrained), _classifiers(facts))
        except WeightShapeError as misfit:
            network = _resized(timm, name, options, pretrained, misfit)
    return network


def _imported() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        missing = "torchvision, which must be the one for your torch" if (error.name or "").startswith("torchvision") else "timm"
        raise BackendError(f"backbones of timm need {missing}: pip install 'bce3s[timm]'") from None
    except Exception as error:  # a torchvision of another torch fails in its own ways
        reason = f"timm cannot be imported ({type(error).__name__})"
        raise BackendError(f"{reason}; install the torchvision that belongs to torch {torch.__version__}") from error
    return timm


def _created(timm: Any, name: str, options: dict[str, Any], of_weights: str = "") -> nn.Module:
    try:
        network: nn.Module = timm.create_model(name, pretrained=bool(of_weights), **options)
    except Exception as error:  # of the network, of the hub, of the connection
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise ConfigError(f"timm cannot build '{name}'{f', {of_weights}' if of_weights else ''} ({reason})") from error
    return network


def _resized(timm: Any, name: str, options: dict[str, Any], pretrained: str, misfit: WeightShapeError) -> nn.Module:
    """Loaded by timm, which knows how to resize its tables of positions; other shapes that differ it refuses as well."""
    source = {"file": pretrained, "custom_load": False}
    try:
        network: nn.Module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **options)
    except RuntimeError:
        raise misfit from None
    return network


def _classifiers(facts: Any) -> tuple[str, ...]:
    """Names of the classifiers of the published network, which a network for features does not have."""
    names = facts.classifier if facts is not None else None
    return (names,) if isinstance(names, str) else tuple(names or ())
