"""Weights from files: what loads, and the sentence for what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bce3s.config import ModelConfig
from bce3s.models import build_recogniser, load_pretrained
from bce3s.models.resnet_cifar import ResNetCifar
from pipelines.types import ConfigError


def save(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def fresh_state() -> dict[str, Tensor]:
    return dict(ResNetCifar(8).state_dict())


def test_a_torchvision_file_loads_and_its_classifier_is_left_out(tmp_path: Path) -> None:
    source = build_recogniser(ModelConfig(arch="resnet18"), 3).backbone
    state = source.state_dict() | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    loaded = build_recogniser(ModelConfig(arch="resnet18", pretrained=str(save(tmp_path / "resnet18.pth", state))), 3).backbone.state_dict()
    assert loaded.keys() == source.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())


def test_a_file_without_batch_counters_loads(tmp_path: Path) -> None:
    state = {key: value for key, value in fresh_state().items() if not key.endswith("num_batches_tracked")}
    backbone = ResNetCifar(8)
    load_pretrained(backbone, save(tmp_path / "old.pth", state))
    assert all(torch.equal(backbone.state_dict()[key], value) for key, value in state.items())


def test_wrong_keys_are_named(tmp_path: Path) -> None:
    missing = fresh_state()
    del missing["layer2.0.conv1.weight"]
    unexpected = {"state_dict": fresh_state(), "epoch": 3} | fresh_state()
    resized = fresh_state() | {"conv1.weight": torch.zeros(16, 3, 7, 7)}
    untyped = fresh_state() | {"bn1.bias": 3}
    cases = {
        "lacks layer2.0.conv1.weight": missing,
        "has unexpected state_dict, epoch": unexpected,
        "has other shapes for conv1.weight": resized,
        "has other shapes for bn1.bias": untyped,
    }
    for sentence, state in cases.items():
        path = save(tmp_path / "weights.pth", state)
        with pytest.raises(ConfigError) as caught:
            load_pretrained(ResNetCifar(8), path)
        assert str(caught.value) == f"pretrained weights '{path}' do not fit this architecture: the file {sentence}"


def test_many_wrong_keys_are_counted(tmp_path: Path) -> None:
    deeper = save(tmp_path / "deeper.pth", ResNetCifar(14).state_dict())
    with pytest.raises(ConfigError, match=r"layer1\.1\.conv1\.weight, layer1\.1\.bn1\.weight, layer1\.1\.bn1\.bias and 33 more$"):
        load_pretrained(ResNetCifar(8), deeper)


def test_a_refused_file_changes_nothing(tmp_path: Path) -> None:
    backbone = ResNetCifar(8)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(ConfigError):
        load_pretrained(backbone, save(tmp_path / "deeper.pth", ResNetCifar(14).state_dict()))
    assert all(torch.equal(backbone.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"PK\x03\x04 cut short", bytes(range(256))])
def test_damaged_files_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"damaged\.pth' cannot be read \(\w+\); download the file again$"):
        load_pretrained(ResNetCifar(8), path)


def test_a_truncated_file_is_one_sentence(tmp_path: Path) -> None:
    path = save(tmp_path / "cut.pth", fresh_state())
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ConfigError, match=r"cut\.pth' cannot be read"):
        load_pretrained(ResNetCifar(8), path)


def test_a_file_with_code_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_pretrained(ResNetCifar(8), save(tmp_path / "module.pth", ResNetCifar(8)))


def test_a_file_without_state_dict_and_a_missing_one_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"list\.pth' hold no state dict"):
        load_pretrained(ResNetCifar(8), save(tmp_path / "list.pth", [1, 2]))
    with pytest.raises(ConfigError, match=r"absent\.pth' do not exist or are not a file"):
        load_pretrained(ResNetCifar(8), tmp_path / "absent.pth")
    with pytest.raises(ConfigError, match="do not exist or are not a file"):
        load_pretrained(ResNetCifar(8), tmp_path)
