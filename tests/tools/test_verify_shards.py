"""The verifier as a user runs it: one line for good shards, the sample by name for damaged ones, one sentence for a mistake."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests import commands
from tests.pipelines.format.folders import patch, read_json, write_folder, write_json

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return commands.run(*arguments, cwd=cwd, program=str(ROOT / "tools" / "verify_shards.py"), variables={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("good") / "shards")


@pytest.fixture
def shards(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "shards"))


@pytest.mark.parametrize(("arguments", "how"), [([], "verified"), (["--no-decode"], "verified without decoding")])
def test_good_shards_are_one_line(good: Path, arguments: list[str], how: str) -> None:
    found = run("shards", *arguments, cwd=good.parent)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == f"24 images in 6 shards {how}\n"


def test_a_damaged_image_is_named_with_its_shard_on_a_line_of_its_own(shards: Path) -> None:
    record = np.load(shards / "train.index.npy")[7]
    patch(shards / "train-000001.tar", int(record["offset"]) + int(record["size"]) // 2, b"\xff\xff\xff")
    (shards / "notes.txt").write_text("")
    found = run("shards", cwd=shards.parent)
    assert (found.returncode, found.stderr) == (1, "")
    warning, sample, shard = found.stdout.splitlines()
    assert warning == "warning: shards/notes.txt is not named in the manifest"
    assert sample.startswith("sample 00000007 of shards/train-000001.tar is not a readable image: ")
    assert shard.startswith("shards/train-000001.tar has not the checksum that the manifest says: ")


def test_warnings_alone_are_no_failure(shards: Path) -> None:
    (shards / "notes [1].txt").write_text("")
    found = run("shards", cwd=shards.parent)
    assert found.returncode == 0
    assert found.stdout.splitlines() == [
        "warning: shards/notes [1].txt is not named in the manifest",
        "24 images in 6 shards verified",
    ]


def test_a_long_list_is_cut_with_a_count(shards: Path) -> None:
    for number in range(70):
        (shards / f"stray-{number:02d}").write_text("")
    found = run("shards", cwd=shards.parent)
    lines = found.stdout.splitlines()
    assert len(lines) == 52
    assert lines[50] == "… and 20 more"


def test_repair_brings_an_index_back_and_verifies(shards: Path) -> None:
    before = hashlib.sha256((shards / "train.index.npy").read_bytes()).hexdigest()
    (shards / "train.index.npy").unlink()
    broken = run("shards", cwd=shards.parent)
    assert broken.returncode == 1
    assert broken.stdout == "shards/train.index.npy cannot be read: No such file or directory\n"
    found = run("shards", "--repair-index", cwd=shards.parent)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines() == ["rebuilt shards/train.index.npy from 4 tars (18 samples)", "24 images in 6 shards verified"]
    assert hashlib.sha256((shards / "train.index.npy").read_bytes()).hexdigest() == before
    again = run("shards", "--repair-index", cwd=shards.parent)
    assert again.stdout.splitlines()[0] == "nothing to repair: every index is what its tars say"


def test_repair_refuses_tars_that_are_damaged_themselves(shards: Path) -> None:
    patch(shards / "train-000002.tar", 700, b"\0\0\0")
    (shards / "train.index.npy").unlink()
    found = run("shards", "--repair-index", cwd=shards.parent)
    assert found.returncode == 1
    assert "shards/train.index.npy was not rebuilt, because its tars are not whole" in found.stdout
    assert "shards/train-000002.tar has not the checksum that the manifest says: it is damaged; copy it again" in found.stdout
    assert not (shards / "train.index.npy").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["absent"], "no shards at absent: the folder does not exist"),
        (["absent", "--repair-index"], "no shards at absent: the folder does not exist"),
        (["empty"], "empty holds no manifest.json"),
        (["empty", "--repair-index"], "empty/manifest.json cannot be rebuilt: class names and checksums stood only there"),
        (["torn"], "torn/manifest.json is damaged (not JSON"),
        (["other"], "other/manifest.json has format version 2"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    for name in ("empty", "torn", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn" / "manifest.json").write_text('{"format"')
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({"format": "bce3s-shards", "version": 2}))
    found = run(*arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert len(found.stderr.strip().splitlines()) == 1, found.stderr
    assert sentence in found.stderr


def test_an_unusable_manifest_is_a_finding(shards: Path) -> None:
    manifest = read_json(shards)
    manifest["splits"]["train"]["shards"][0]["file"] = "../elsewhere.tar"
    write_json(shards, manifest)
    found = run("shards", cwd=shards.parent)
    assert (found.returncode, found.stderr) == (1, "")
    assert found.stdout == "shards/manifest.json has a splits.train.shards[0].file that is not a plain name\n"


def test_a_beton_is_compared_with_the_tars(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    root = write_folder(tmp_path / "shards", streams=False, betons=True)
    assert run("shards", cwd=tmp_path).returncode == 0
    # The checksum is forged, so that only the comparison can tell.
    content = bytearray((root / "train.beton").read_bytes())
    image = (root / "train-000000.tar").read_bytes()[512:600]
    start = content.index(image)
    content[start + 40] ^= 0xFF
    (root / "train.beton").write_bytes(content)
    manifest = read_json(root)
    manifest["splits"]["train"]["beton"]["sha256"] = hashlib.sha256(content).hexdigest()
    write_json(root, manifest)
    found = run("shards", cwd=tmp_path)
    assert found.returncode == 1
    assert "train.beton" in found.stdout
    assert "sample" in found.stdout
