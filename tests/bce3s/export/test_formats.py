"""Every format computes what the trained network does, says so only when it does, and needs nothing of this project to be read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import safetensors.torch
import torch
from torch import Tensor

from bce3s.export import load_exported
from bce3s.export.formats import FORMATS, GraphOptions, load_format
from bce3s.export.parity import BATCH_SIZES, Images, Parity, compare, parity_images
from bce3s.export.plain import Export
from bce3s.export.write import Written
from pipelines.types import ConfigError, UserError
from tests.bce3s.export.exports import opened_for_export, with_network, write
from tests.commands import ROOT

GetWritten = Callable[[str], tuple[Written, Export]]
NO_OPTIONS = GraphOptions()


def compared(export: Export, name: str, path: Path) -> Parity:
    return compare(export, load_format(name, NO_OPTIONS).open(path, export), parity_images(export, None), takes_pixels=False)


def first_convolution(weights: dict[str, Tensor]) -> Tensor:
    return next(weights[name] for name in sorted(weights) if name.endswith("conv1.weight"))


def changed(path: Path, name: str, to: Path, change: Callable[[Tensor], Tensor]) -> Path:
    """The export at `path` with `change` applied to the weights of its first convolution."""
    if name == "timm":
        to.mkdir()
        (to / "config.json").write_bytes((path / "config.json").read_bytes())
        path, to = path / "model.safetensors", to / "model.safetensors"
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            weights, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
        weight = first_convolution(weights)
        weight.copy_(change(weight))
        safetensors.torch.save_file(weights, to, metadata)
        return to.parent if name == "timm" else to
    if path.suffix == ".pth":
        weights = torch.load(path, weights_only=True)
        weight = first_convolution(weights)
        weight.copy_(change(weight))
        torch.save(weights, to)
    elif path.suffix == ".onnx":
        model = onnx.load(path)
        tensor = next(entry for entry in model.graph.initializer if list(entry.dims) == [16, 3, 3, 3])
        weight = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(onnx.numpy_helper.from_array(change(weight).numpy(), tensor.name))
        onnx.save(model, to)
    else:
        with warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning):  # torch has changed its mind on which
                warnings.simplefilter("ignore", kind)
            graph = torch.jit.load(str(path))
            weight = dict(graph.named_parameters())["backbone.conv1.weight"]
            weight.data.copy_(change(weight.data))
            graph.save(str(to))
    return to


# ---- what is written computes what was trained


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_computes_the_logits_of_the_trained_network_on_test_images(name: str, written: GetWritten) -> None:
    made, _ = written(name)
    parity = made.parity
    assert parity is not None
    assert parity.holds
    assert parity.fault == ""
    assert parity.equal_top1 == 1.0
    assert parity.max_difference < 0.2 * parity.tolerance
    assert parity.images == "images of the test split"
    assert parity.num_images == 20  # all there are: batches of 1, 7 and the rest
    assert made.card.is_file()


@pytest.mark.parametrize("name", FORMATS)
def test_one_changed_weight_fails_the_check(name: str, written: GetWritten, tmp_path: Path) -> None:
    def change(weight: Tensor) -> Tensor:
        changed = weight.clone()
        changed.view(-1)[100] += 0.1
        return changed

    made, export = written(name)
    out = made.out
    same = changed(out, name, tmp_path / f"same{out.suffix}", lambda weight: weight)
    other = changed(out, name, tmp_path / f"other{out.suffix}", change)
    assert compared(export, name, same).holds
    parity = compared(export, name, other)
    assert not parity.holds
    assert parity.max_difference > parity.tolerance


@pytest.mark.parametrize("fault", ["half precision", "not a number"])
def test_the_check_sees_weights_that_were_rounded_or_lost(fault: str, written: GetWritten, tmp_path: Path) -> None:
    made, export = written("torchvision-state-dict")
    state = torch.load(made.out, weights_only=True)
    if fault == "half precision":
        state = {name: tensor.half().float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    else:
        state["fc.bias"][3] = torch.nan
    torch.save(state, tmp_path / "net.pth")
    assert not compared(export, "torchvision-state-dict", tmp_path / "net.pth").holds


def test_the_check_sees_a_batch_size_that_was_baked_in(written: GetWritten, tmp_path: Path) -> None:
    made, export = written("onnx")
    model = onnx.load(made.out)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7
    onnx.save(model, tmp_path / "fixed.onnx")
    parity = compared(export, "onnx", tmp_path / "fixed.onnx")
    assert not parity.holds
    assert re.search("ONNX Runtime .* does not run it: at batch size 1, InvalidArgument", parity.sentence())


# ---- what is written needs nothing of ours, and tells nothing of ours


def test_the_model_cards_code_runs_without_this_project(written: GetWritten, export: Export, tmp_path: Path) -> None:
    """In a Python that cannot import it: what the cards of ONNX and TorchScript say, word for word."""
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "images.npy", images.numpy())
    script = ["import sys", "sys.modules.update(bce3s=None, pipelines=None)", "import numpy, torch"]
    for name in ("onnx", "torchscript"):
        made, _ = written(name)
        (tmp_path / made.out.name).symlink_to(made.out)
        code = re.search("```python\n(.*?)```", made.card.read_text(), re.DOTALL)
        assert code is not None
        script += ["images = numpy.load('images.npy')" + (".copy()" if name == "onnx" else "; images = torch.from_numpy(images)")]
        script += [code[1], f"numpy.save('{name}.npy', numpy.asarray(logits)); print(*names)"]
    ended = subprocess.run(
        [sys.executable, "-I", "-c", "\n".join(script)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    expected = export.network(images)
    for name in ("onnx", "torchscript"):
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected.numpy(), atol=1e-4)
    assert ended.stdout.splitlines() == 2 * [" ".join(export.trained.class_names[k] for k in expected.argmax(1))]


@pytest.mark.parametrize("name", FORMATS)
def test_no_file_names_the_folders_of_whoever_exported(name: str, written: GetWritten, run: Path) -> None:
    made, _ = written(name)
    for path in [*made.out.iterdir()] if made.out.is_dir() else [made.out, made.card]:
        contents = {path.name: path.read_bytes()}
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents = {entry: archive.read(entry) for entry in archive.namelist()}
        for entry, content in contents.items():
            for secret in (ROOT, run, Path(torch.__file__).parent):
                assert str(secret).encode() not in content, f"{entry} holds {secret}"


def test_a_torchvision_state_dict_has_torchvisions_names_and_plain_tensors(written: GetWritten) -> None:
    made, export = written("torchvision-state-dict")
    state = torch.load(made.out, weights_only=True)
    assert len(state) == 122  # of torchvision's resnet18
    for name, shape in {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer4.1.bn2.bias": (512,),
        "fc.weight": (4, 512),
        "fc.bias": (4,),
    }.items():
        assert state[name].shape == shape
        assert state[name].dtype == torch.float32
    # A checkpoint of a network in channels-last would load as such, and slow down whoever did not ask for it.
    assert not export.trained.model.backbone.conv1.weight.is_contiguous()
    assert all(tensor.is_contiguous() for tensor in state.values())
    # Unit rows: they meet the features as the normalised classifier's do.
    torch.testing.assert_close(state["fc.weight"].norm(dim=1), torch.ones(4))


def test_torchvision_itself_loads_it(written: GetWritten) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = torchvision.models.resnet18(num_classes=4).eval()
    made, export = written("torchvision-state-dict")
    model.load_state_dict(torch.load(made.out, weights_only=True))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), export.network(images), atol=1e-4, rtol=0)


def test_timm_itself_loads_it_with_its_preprocessing(written: GetWritten) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    made, _ = written("timm")
    model = timm.create_model(f"local-dir:{made.out}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == [f"class-{k}" for k in range(4)]
    found = timm.data.resolve_model_data_config(model)
    assert tuple(found["input_size"]) == (3, 16, 16)
    assert (found["crop_pct"], found["interpolation"]) == (1.0, "bilinear")
    parity = made.parity
    assert parity is not None
    assert parity.reader.startswith("timm ")


def test_the_timm_folder_is_that_of_the_hub(written: GetWritten) -> None:
    folder = written("timm")[0].out
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("resnet18", 4, 512)
    assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    assert config["pretrained_cfg"]["classifier"] == "fc"


def test_load_exported_gives_what_belongs_to_the_weights(written: GetWritten) -> None:
    made, export = written("safetensors")
    found = load_exported(made.out)
    assert (found.arch, found.dataset, found.method, found.image_size, found.eval_crop) == ("resnet8-cifar", "cifar10-lt", "bce3s", 16, 1.0)
    assert found.class_names == export.trained.class_names
    assert found.class_counts_K.tolist() == [40, 20, 9, 5]
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(found.network(images), export.network(images))
    with safetensors.safe_open(made.out, "pt") as file:
        assert not [name for name in file.keys() if "projector" in name or "memory" in name]


# ---- graphs with options


def test_a_graph_with_preprocessing_takes_pixels(export: Export, tmp_path: Path) -> None:
    written = write(export, "torchscript", tmp_path, preprocess=True, dynamic_size=True)
    assert written.parity is not None
    assert written.parity.holds
    assert "uint8 [B, H, W, 3], RGB pixels" in written.card.read_text()
    assert "Divide by 255" not in written.card.read_text()


@pytest.mark.slow  # a second export to ONNX
def test_an_onnx_graph_takes_pixels_of_any_size_in_a_newer_opset(export: Export, tmp_path: Path) -> None:
    written = write(export, "onnx", tmp_path, preprocess=True, dynamic_size=True, opset=20)
    assert written.parity is not None
    assert written.parity.holds
    opened = load_format("onnx", NO_OPTIONS).open(written.out, export)
    pixels = torch.randint(0, 256, (2, 48, 40, 3), dtype=torch.uint8)
    mean, std = torch.tensor(export.augment.mean), torch.tensor(export.augment.std)
    expected = export.network(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
    torch.testing.assert_close(opened.run(pixels), expected, atol=1e-4, rtol=0)
    model = onnx.load(written.out)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20}


def test_opsets_that_torch_cannot_write_are_refused(export: Export, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--opset lies from 18 to \d+ here, not 17"):
        write(export, "onnx", tmp_path, opset=17)


# ---- other networks


@pytest.mark.parametrize("kind", ["normalized", "linear", "cosine"])
def test_every_kind_of_classifier_becomes_a_linear_layer(kind: str, export: Export, tmp_path: Path) -> None:
    other = with_network(export, "resnet8-cifar", kind)
    images = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(other.network(images), other.trained.model(images), atol=1e-5, rtol=1e-5)
    assert other.network.unit_features == (kind == "cosine")
    parity = write(other, "safetensors", tmp_path).parity
    assert parity is not None
    assert parity.holds


def test_what_a_format_cannot_express_is_refused_in_a_sentence(export: Export, tmp_path: Path) -> None:
    for arch, classifier, name, sentence in [
        ("resnet8-cifar", "linear", "torchvision-state-dict", "torchvision has no model like resnet8-cifar"),
        ("resnet8-cifar", "linear", "timm", "timm has no model like resnet8-cifar"),
        ("resnet18", "cosine", "torchvision-state-dict", "cannot express a cosine classifier"),
        ("resnet18", "cosine", "timm", "cannot express a cosine classifier"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            write(with_network(export, arch, classifier), name, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- what is compared


def test_without_its_shards_a_run_is_compared_on_random_pixels_and_says_so(export: Export, run: Path) -> None:
    loose = replace(export, trained=replace(export.trained, run=None))
    images = parity_images(loose, None)
    assert images.pixels.shape == (sum(BATCH_SIZES), 16, 16, 3)
    assert (images.what, images.why_random) == ("images of random pixels", "the checkpoint lies outside of a run")
    with pytest.raises(UserError, match="nowhere"):
        parity_images(loose, str(run / "nowhere"))


def test_images_are_compared_from_all_over_the_split(export: Export) -> None:
    # Splits are sorted by class: the front alone would show one class.
    images = parity_images(export, None)
    assert isinstance(images, Images)
    assert len(images.pixels) == 20
    assert len(images.pixels.flatten(1).unique(dim=0)) == 20


@pytest.mark.parametrize("name", ["nothing", "text", "checkpoint"])
def test_load_exported_refuses_other_files(name: str, tmp_path: Path, export: Export) -> None:
    path = {"nothing": tmp_path / "absent", "text": tmp_path / "text.safetensors", "checkpoint": export.trained.path}[name]
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*bce3s export RUN --format safetensors"):
        load_exported(path)


def test_the_exported_network_is_opened_from_a_checkpoint_file_too(export: Export, run: Path) -> None:
    other = opened_for_export(export.trained.path)
    assert other.trained.run == run
    assert torch.equal(other.network.fc.weight, export.network.fc.weight)
