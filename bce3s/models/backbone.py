"""What every backbone promises, and how weights trained elsewhere enter one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.types import ConfigError


class Backbone(nn.Module):
    """Maps images [V, 3, H, W] to features [V, D]; a subclass sets `feature_dim`, which is D.

    The parameters of the convolutions and batch-norms carry torchvision's names (conv1, bn1, layer1.0.conv1, ...), without `fc`. A module
    from elsewhere (external.py) is one by its promise alone, and keeps its own names.
    """

    feature_dim: int


class WeightShapeError(ConfigError):
    """Weights with the right names and other shapes."""


def load_pretrained(backbone: nn.Module, path: Path, classifiers: tuple[str, ...] = ("fc",)) -> None:
    """Copies the weights of a state dict into `backbone`; what belongs to a classifier alone is left out.

    Args:
        backbone: receives the weights in place, keeping its own dtype and device.
        path: what `torch.save(model.state_dict(), path)` wrote, read as plain tensors, so the file cannot run code; or a .safetensors.
        classifiers: modules of the file's network that `backbone` does not have; torchvision calls it `fc`.

    Raises:
        ConfigError: the file is absent, unreadable, or made for another architecture; names the file and the first offending keys.
        WeightShapeError: of these, all names fit and shapes do not.
    """
    own = backbone.state_dict()
    heads = tuple(f"{name}." for name in classifiers)
    state = {key: value for key, value in _read_state(path).items() if key in own or not key.startswith(heads)}
    # Files from before torch 0.4.1 lack this counter; with a constant momentum nothing reads it, and loading fills it in.
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    mismatched = [key for key in state if key in own and getattr(state[key], "shape", None) != own[key].shape]
    for complaint, keys in (("lacks", missing), ("has unexpected", unexpected), ("has other shapes for", mismatched)):
        if keys:
            listed = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            kind = WeightShapeError if keys is mismatched else ConfigError
            raise kind(f"pretrained weights '{path}' do not fit this architecture: the file {complaint} {listed}")
    backbone.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"pretrained weights '{path}' do not exist or are not a file; name a state dict of this architecture")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged pickle or zip fails in a dozen ways, none of which the user can tell apart.
        raise ConfigError(f"pretrained weights '{path}' cannot be read ({type(error).__name__}); download the file again") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ConfigError(f"pretrained weights '{path}' hold no state dict; save one with torch.save(model.state_dict(), path)")
    return state
