"""The Python of docs/python.md runs as it stands, block after block, on small shards and a small run."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bce3s.config import ModelConfig
from tests.bce3s.train.runs import CONFIG, train

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCK = re.compile(r'^```python(?: title="(?P<file>[\w.]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


def test_the_blocks_run_one_after_the_other(
    make_shards: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_shards(train=(104, 21, 9, 5), size=None, extension="jpg", name="folder")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "folder").symlink_to(shards.root)
    config = replace(CONFIG, dataset="folder", epochs=1, model=ModelConfig(arch="resnet8-cifar"))
    train(config, shards, tmp_path / "runs" / "folder-bce3s-resnet18-s0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    namespace: dict[str, Any] = {}
    for block in BLOCK.finditer(TEXT):
        if block["file"]:
            Path(block["file"]).write_text(block["code"])
        else:
            line = TEXT.count("\n", 0, block.start("code"))
            exec(compile("\n" * line + block["code"], str(PAGE), "exec"), namespace)
    sys.modules.pop("my_networks")
    said = capsys.readouterr().out
    assert "torch.Size([64, 32, 32, 3]) torch.uint8 torch.Size([64])" in said
    assert re.search(r"^all \d+\.\d\d\nmany \d+\.\d\d\nmedium \d+\.\d\d\nfew \d+\.\d\d$", said, re.MULTILINE)
    assert len(re.findall(r"^class-[0-3] [01]\.\d\d$", said, re.MULTILINE)) == 16
    assert said.endswith("\n128\n")


def test_every_python_block_is_run() -> None:
    assert len(re.findall(r"^[ >]*(?:```|~~~) *(?:py\b|python)", TEXT, re.MULTILINE)) == len(BLOCK.findall(TEXT)) >= 7


def test_every_name_it_takes_from_us_is_public() -> None:
    taken = [
        (node.module, alias.name)
        for block in BLOCK.finditer(TEXT)
        for node in ast.walk(ast.parse(block["code"]))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("bce3s", "pipelines")
        for alias in node.names
    ]
    assert len(taken) >= 12
    hidden = [f"{module}.{name}" for module, name in taken if name not in import_module(module).__all__]
    assert not hidden
