"""Networks of timm: as features, at other sizes, with weights from files; where timm cannot be imported, the sentence that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bce3s.config import ModelConfig
from bce3s.models import Backbone, build_backbone
from pipelines.types import BackendError, ConfigError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def timm() -> Any:
    return pytest.importorskip("timm", reason="timm cannot be imported", exc_type=ImportError)


def build(name: str, *sides: int, pretrained: str = "") -> Backbone:
    torch.manual_seed(0)
    return build_backbone(ModelConfig(arch=f"timm:{name}", pretrained=pretrained), sides)


def test_without_timm_the_sentence_has_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BackendError, match=r"need timm: pip install 'bce3s\[timm\]'$"):
        build("resnet18", 32)


def test_a_timm_that_does_not_fit_torch_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(BackendError, match=r"^timm cannot be imported \(RuntimeError\); install the torchvision that belongs to torch \d"):
        build("resnet18", 32)


# MobileNetV3's own `num_features` is not what it gives.
@pytest.mark.parametrize(("name", "feature_dim"), [("test_resnet", 96), ("test_convnext", 64), ("mobilenetv3_small_050", 1024)])
@pytest.mark.usefixtures("timm")
def test_a_network_gives_its_pooled_features(name: str, feature_dim: int) -> None:
    backbone = build(name, 32)
    assert backbone.feature_dim == feature_dim
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, feature_dim)
    assert not any(key.startswith(("fc.", "head.fc.", "classifier.")) for key in backbone.state_dict())


@pytest.mark.usefixtures("timm")
def test_a_vision_transformer_is_built_for_the_images_of_the_run() -> None:
    assert build("test_vit", 48).pos_embed.shape == (1, 10, 64)  # 3 × 3 patches and the class token
    growing = build("test_vit", 48, 32)
    assert growing(torch.randn(2, 3, 32, 32)).shape == growing(torch.randn(2, 3, 48, 48)).shape == (2, 64)
    with pytest.raises(ConfigError, match=r"^arch 'timm:test_vit' cannot take images of 40 px: AssertionError: Input height \(40\)"):
        build("test_vit", 40)


@pytest.mark.usefixtures("timm")
def test_unknown_names_are_corrected() -> None:
    with pytest.raises(ConfigError, match=r"^timm has no model 'convnext_tinny'; did you mean 'convnext_tiny'\?$"):
        build("convnext_tinny", 32)
    with pytest.raises(ConfigError, match=r"^timm has no model 'q9'; timm\.list_models\(\) lists them$"):
        build("q9", 32)
    with pytest.raises(ConfigError, match=r"^timm cannot build 'test_resnet\.q9' \(RuntimeError: Invalid pretrained tag"):
        build("test_resnet.q9", 32)


def test_a_file_in_timms_names_loads_without_its_classifier(timm: Any, tmp_path: Path) -> None:
    published = timm.create_model("test_convnext", num_classes=7).state_dict()
    torch.save(published, tmp_path / "published.pth")
    loaded = build("test_convnext", 32, pretrained=str(tmp_path / "published.pth")).state_dict()
    assert set(published) - set(loaded) == {"head.fc.weight", "head.fc.bias"}
    assert all(torch.equal(value, published[name]) for name, value in loaded.items())
    with pytest.raises(ConfigError, match="do not fit this architecture: the file lacks"):
        build("test_resnet", 32, pretrained=str(tmp_path / "published.pth"))


def test_positions_of_another_size_are_resized_and_other_shapes_refused(timm: Any, tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    published = timm.create_model("test_vit", img_size=64).state_dict()
    torch.save(published, path)
    loaded = build("test_vit", 32, pretrained=str(path)).state_dict()
    different = [name for name, value in loaded.items() if value.shape != published[name].shape or not torch.equal(value, published[name])]
    assert different == ["pos_embed"]
    torch.save(published | {"patch_embed.proj.bias": torch.zeros(3)}, path)
    with pytest.raises(ConfigError, match=r"the file has other shapes for pos_embed, patch_embed\.proj\.bias$"):
        build("test_vit", 32, pretrained=str(path))


@pytest.mark.slow  # imports timm anew
@pytest.mark.usefixtures("timm")
def test_without_a_network_the_sentence_names_the_other_way(tmp_path: Path) -> None:
    program = (
        "from bce3s.config import ModelConfig; from bce3s.models import build_backbone;"
        "build_backbone(ModelConfig(arch='timm:test_resnet', pretrained='timm'), (32,))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    expected = "timm cannot build 'test_resnet', its weights cannot be had; name a file that has them with --set model.pretrained=PATH ("
    assert expected in found.stderr.strip().splitlines()[-1]
