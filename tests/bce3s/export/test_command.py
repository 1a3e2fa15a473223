"""`bce3s export` as a user types it: what it says, what lies there afterwards, and its exit status."""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
import typer

from bce3s.export.command import export
from bce3s.export.formats import FORMATS, GraphOptions, Opened, load_format
from bce3s.export.place import require_room
from bce3s.export.plain import Export
from pipelines.types import BackendError, ConfigError, UserError
from tests.bce3s.export import exports
from tests.bce3s.export.exports import opened_for_export, write
from tests.commands import run as bce3s

DOUBLED = "tests.bce3s.export.exports:DOUBLED"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_is_written_checked_and_described(home: Path) -> None:
    found = bce3s("export", "run", "--format", "safetensors", cwd=home)
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    first, second = found.stdout.splitlines()
    out = "run/export/resnet8-cifar.safetensors"
    assert re.fullmatch(rf"wrote {out} \(0\.3 MB\) and its model card {out}\.md", first)
    assert re.fullmatch(
        r"checked: logits differ by at most \S+ \(tolerance \S+\) and top-1 is equal for 100\.0% of 20 images of the test split, "
        r"read by load_exported",
        second,
    )
    assert names(home / "run" / "export") == {"resnet8-cifar.safetensors", "resnet8-cifar.safetensors.md"}

    again = bce3s("export", "run", "--format", "safetensors", cwd=home)
    assert again.returncode == 2
    assert again.stderr == f"error: {out} is there already; add --overwrite, or choose another --out\n"


def test_the_average_of_a_stage_one_and_the_classifier_of_a_stage_two_are_what_is_written(home: Path) -> None:
    average = bce3s("export", "run", "--format", "safetensors", "--average", "--out", "average.safetensors", "--json", cwd=home)
    assert average.returncode == 0, average.stderr
    found = json.loads(average.stdout)
    assert (found["out"], found["model_card"]) == ("average.safetensors", "average.safetensors.md")
    assert found["bytes"] == (home / "average.safetensors").stat().st_size
    assert found["parity"]["holds"] is True
    assert "**last epoch, average of weights**" in (home / "average.safetensors.md").read_text()

    lws = bce3s("export", "run/stage2-lws", "--format", "torchscript", "--out", "lws.pt", cwd=home)
    assert lws.returncode == 0, lws.stderr
    card = (home / "lws.pt.md").read_text()
    assert "trained with the method bce3s, classifier retrained by lws" in card

    plain, moved = (opened_for_export(home / place).network for place in ("run", "run/stage2-lws"))
    with safetensors.safe_open(home / "average.safetensors", "pt") as file:
        weight = file.get_tensor("backbone.conv1.weight")
    assert not torch.equal(weight, plain.weights()["backbone.conv1.weight"])
    assert torch.equal(moved.weights()["backbone.conv1.weight"], plain.weights()["backbone.conv1.weight"])
    assert not torch.equal(moved.fc.weight, plain.fc.weight)


def test_what_computes_something_else_is_not_put_in_place(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FORMATS, "doubled", DOUBLED)
    out = home / "out" / "net.doubled"
    with pytest.raises(typer.Exit) as ended:
        export(home / "run", "doubled", out=out)
    assert ended.value.exit_code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"NOT WRITTEN: {out}, for it does not compute what the trained network does: logits differ by at most")
    assert names(home / "out") == set()

    # Unchecked it is written, and its card says so.
    export(home / "run", "doubled", out=out, no_check=True)
    assert names(home / "out") == {"net.doubled", "net.doubled.md"}
    assert "Not checked against the trained network" in (home / "out" / "net.doubled.md").read_text()

    # What its own reader cannot open is not put in place either.
    def fails(path: Path, export: Export) -> Opened:
        raise RuntimeError("operator of the future\nand a page of details")

    monkeypatch.setattr("tests.bce3s.export.exports.DOUBLED", replace(exports.DOUBLED, open=fails))
    with pytest.raises(UserError, match=r"net.doubled cannot be read back .* \(RuntimeError: operator of the future\)"):
        export(home / "run", "doubled", out=out, overwrite=True)
    monkeypatch.undo()
    monkeypatch.setitem(FORMATS, "doubled", DOUBLED)

    # What was there before still stands when a replacement fails.
    out.write_text("before")
    with pytest.raises(typer.Exit):
        export(home / "run", "doubled", out=out, overwrite=True)
    assert out.read_text() == "before"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--format", "onx"], "unknown format 'onx'; known: safetensors, onnx, torchscript, torchvision-state-dict, timm"),
        (["--format", "safetensors", "--preprocess"], "--preprocess says nothing to --format safetensors: leave it out"),
        (["--format", "torchscript", "--opset", "18"], "--opset says nothing to --format torchscript: leave it out"),
        (["--format", "timm"], "timm has no model like resnet8-cifar"),
        (["--format", "safetensors", "--shards", "absent"], "absent"),
        (["--format", "safetensors", "--out", "run"], "run is a folder, and this format is a file that ends in .safetensors"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], sentence: str, home: Path) -> None:
    found = bce3s("export", "run", *arguments, *([] if "--out" in arguments else ["--out", "none/of/these"]), cwd=home)
    assert found.returncode == 2
    assert found.stdout == ""
    assert sentence in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not (home / "none" / "of").exists()


def test_a_missing_package_is_one_sentence_with_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxscript.py").write_text("raise ImportError('not in this environment')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxscript"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        BackendError, match=r"onnxscript, which cannot be imported \(not in this environment\); pip install 'bce3s\[export\]'"
    ):
        load_format("onnx", GraphOptions())


def test_a_full_disk_is_one_sentence_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    exported = opened_for_export(home / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=f"cannot write {tmp_path}/net.safetensors: File too large; mend that"):
            write(exported, "safetensors", tmp_path, check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == set()


def test_only_an_export_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "net-timm"
    folder.mkdir()
    require_room(folder, "", overwrite=False)  # empty
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="add --overwrite"):
        require_room(folder, "", overwrite=False)
    require_room(folder, "", overwrite=True)
    (folder / "thesis.tex").write_text("three years")
    with pytest.raises(ConfigError, match="holds more than an export"):
        require_room(folder, "", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is no folder that can be written to"):
        require_room(tmp_path / "file" / "net.onnx", ".onnx", overwrite=False)


def test_a_run_whose_shards_are_gone_is_checked_on_random_pixels(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "run", tmp_path / "run", ignore=shutil.ignore_patterns("export", "stage2-*"))
    environment = tmp_path / "run" / "environment.json"
    environment.write_text(json.dumps(json.loads(environment.read_text()) | {"shards": str(tmp_path / "moved")}))
    found = bce3s("export", "run", "--format", "torchscript", "--preprocess", "--out", "net.pt", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    checked = found.stdout.splitlines()[1]
    assert "64 images of random pixels, read by torch.jit; real images were not to be had: the shards of run are not at" in checked
    card = (tmp_path / "net.pt.md").read_text()
    assert "64 images of random pixels, read by torch.jit." in card
    assert str(tmp_path) not in card
