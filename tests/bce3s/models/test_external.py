"""Networks of one's own by `package.module:factory`: any module does that makes features of images; what does not is one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bce3s.config import ModelConfig
from bce3s.models import Backbone, build_backbone, build_recogniser
from pipelines.types import ConfigError

ROOT = Path(__file__).resolve().parents[3]
NAMES = (f"networks_{number}" for number in count())
WriteModule = Callable[[str], str]

MODULE = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride=4)
        self.fc = nn.Linear(channels, 5)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean((2, 3)))

class Lazy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.LazyLinear(7))

class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(images)

class Stated(Tiny):
    feature_dim = 6

class ReadOnly(Tiny):
    @property
    def feature_dim(self):
        return 6

def maps(): return nn.Conv2d(3, 4, 3)
def one_row(): return Returning(lambda images: images.mean((0, 2, 3))[None])
def both(): return Returning(lambda images: (images.mean((2, 3)), images))
def whole_numbers(): return Returning(lambda images: torch.zeros(len(images), 4, dtype=torch.int64))
def by_size(): return nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten())
def of_32_px(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
def needs_argument(depth): return Tiny(depth)
def gives_class(): return Tiny
number = 3
"""


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteModule]:
    """Writes a module that can be imported, under a name that no other test has seen."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written: list[str] = []

    def write(source: str) -> str:
        written.append(next(NAMES))
        (tmp_path / f"{written[-1]}.py").write_text(source)
        return written[-1]

    yield write
    for name in written:
        sys.modules.pop(name, None)


def build(arch: str, *sides: int, pretrained: str = "") -> Backbone:
    return build_backbone(ModelConfig(arch=arch, pretrained=pretrained), sides)


@pytest.mark.parametrize(("factory", "feature_dim"), [("Tiny", 5), ("Lazy", 7), ("Stated", 5)])
def test_the_number_of_features_is_what_the_network_gives(write_module: WriteModule, factory: str, feature_dim: int) -> None:
    recogniser = build_recogniser(ModelConfig(arch=f"{write_module(MODULE)}:{factory}", projection_dim=4), 3, image_sides=(16,))
    assert recogniser.backbone.feature_dim == feature_dim
    assert recogniser.training
    assert recogniser(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    # Its parameters keep their names behind "backbone.", so that weights go in and out as they are.
    assert {f"backbone.{name}" for name in recogniser.backbone.state_dict()} < set(recogniser.state_dict())


def test_weights_are_those_of_torchs_generator(write_module: WriteModule) -> None:
    arch = f"{write_module(MODULE)}:Lazy"
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_recogniser(ModelConfig(arch=arch), 3, image_sides=(16,)).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_from_a_file_enter_under_the_networks_own_names(write_module: WriteModule, tmp_path: Path, suffix: str) -> None:
    arch = f"{write_module(MODULE)}:Tiny"
    state = build(arch, 16).state_dict()  # `fc` is part of this network, and no classifier to leave out
    path = tmp_path / f"weights.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    loaded = build(arch, 16, pretrained=str(path)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError, match=rf"weights\.{suffix}' cannot be read \(\w+\); download the file again$"):
        build(arch, 16, pretrained=str(path))


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("Tine", "has no callable 'Tine'; did you mean '{module}:Tiny'?"),
        ("zzzzzz", "has no callable 'zzzzzz'; name a function or class that returns the network"),
        ("", "has no callable ''; name a function"),
        ("number", "has no callable 'number'"),
        ("needs_argument", "cannot be built: TypeError: needs_argument() missing 1 required positional argument: 'depth' (it is called"),
        ("gives_class", "gives an object of type type; it must return a torch.nn.Module"),
        ("maps", "gives float32 [2, 4, 14, 14] for 2 images of 16 px where float features [2, D] are needed; end it with a mean"),
        ("one_row", "gives float32 [1, 3] for 2 images"),
        ("whole_numbers", "gives int64 [2, 4] for 2 images"),
        ("both", "gives an object of type tuple for images; it must return one tensor [V, D]"),
        ("of_32_px", "cannot take images of 16 px: RuntimeError: mat1 and mat2 shapes"),
        ("ReadOnly", "gives 5 features an image, and its own feature_dim says otherwise"),
    ],
)
def test_what_does_not_do_is_one_sentence(write_module: WriteModule, factory: str, sentence: str) -> None:
    module = write_module(MODULE)
    with pytest.raises(ConfigError) as caught:
        build(f"{module}:{factory}", 16)
    assert str(caught.value).startswith(f"arch '{module}:{factory}'")
    assert sentence.format(module=module) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_features_must_not_depend_on_the_size_of_the_image(write_module: WriteModule) -> None:
    arch = f"{write_module(MODULE)}:by_size"
    assert build(arch, 16).feature_dim == 256
    with pytest.raises(ConfigError, match="another number of features for images of another size"):
        build(arch, 16, 32)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import absent_library", "failed: ModuleNotFoundError: No module named 'absent_library'"),
        ("def f(:", "failed: SyntaxError: "),
        ("raise OSError('no licence\\nfound')", "failed: OSError: no licence"),
    ],
)
def test_a_module_that_fails_says_what_failed(write_module: WriteModule, source: str, sentence: str) -> None:
    module = write_module(source)
    with pytest.raises(ConfigError) as caught:
        build(f"{module}:net", 16)
    assert str(caught.value).startswith(f"arch '{module}:net': importing '{module}' {sentence}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent_networks", "absent.networks"])
def test_a_module_that_is_not_there_says_where_to_put_it(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"there is no module 'absent(_networks)?'; start where it lies, or put its folder on PYTHONPATH$"
    ):
        build(f"{name}:net", 16)


def test_a_module_in_the_folder_of_the_command_is_found_behind_what_is_installed(tmp_path: Path) -> None:
    """As the console script starts: without the current folder on its path."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "safetensors.py").write_text("raise SystemExit('hidden')")
    program = (
        "import sys; sys.path = [p for p in sys.path if p]; from bce3s.config import ModelConfig; from bce3s.models import build_backbone;"
        "print(build_backbone(ModelConfig(arch='mine:Tiny'), (16,)).feature_dim)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr) == ("5\n", "")


def test_downloads_are_for_timm_alone() -> None:
    with pytest.raises(ConfigError, match=r"^pretrained=timm is for an arch timm:NAME, not resnet18: name a file of weights$"):
        ModelConfig(arch="resnet18", pretrained="timm")


@pytest.mark.parametrize(("arch", "title"), [("timm:vit_base.augreg/x", "timm-vit_base.augreg-x"), ("resnet32-cifar-x4",) * 2])
def test_a_run_folder_can_be_named_by_the_network(arch: str, title: str) -> None:
    assert ModelConfig(arch=arch).title == title
