"""`bce3s predict` as a user types it: files, folders and standard input, three formats, and an exit status that tells."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import signal
import struct
import subprocess
import termios
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.format import ShardSet
from tests.bce3s.train.runs import CONFIG, train, wait_until
from tests.commands import begin, finish, run

# A program of its own, because a forked command has the standard input of its parent.
FROM_STANDARD_INPUT = """
import os, sys
os.dup2(os.open(sys.argv[1], os.O_RDONLY), 0)
from bce3s.cli import main
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def shards(make_shards: Any) -> ShardSet:
    found: ShardSet = make_shards(train=(24, 20, 16, 12), size=None, extension="jpg", test=11)
    return found


@pytest.fixture(scope="module")
def home(shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and with its test images: photos/<first>/<second>/<id>.jpg."""
    folder = tmp_path_factory.mktemp("predict")
    train(replace(CONFIG, ema_decay=0.5), shards, folder / "run")
    split = shards.split("test")
    for i, encoded in enumerate(split.encoded(np.arange(len(split)))):
        path = folder / "photos" / f"{i // 20}" / f"{i // 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded.tobytes())
    return folder


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def predicted(home: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return run("predict", "run", *arguments, cwd=home, **options)


@pytest.mark.parametrize("options", [[], ["--average"]])
def test_a_folder_gives_the_accuracy_that_evaluation_gives(home: Path, shards: ShardSet, options: list[str]) -> None:
    found = predicted(home, "photos", "--top", "1", *options)
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    table = rows(found.stdout)
    assert [Path(row["path"]).stem for row in table] == [f"{i:05d}" for i in range(44)]  # by name, folder by folder
    assert list(table[0]) == ["path", "rank", "class", "label", "sigmoid"]
    labels_N = np.array([int(row["label"]) for row in table])
    assert [row["class"] for row in table] == [shards.class_names[label] for label in labels_N]
    assert len(set(labels_N)) > 1
    right_K = np.bincount(labels_N[labels_N == shards.split("test").labels_N], minlength=4)
    figures = json.loads(run("evaluate", "run", "--json", *options, cwd=home).stdout)
    (headline,) = [figures[name] for name in figures if "TTA" not in name]
    assert headline["per_class"] == (100 * right_K / 11).tolist()


def test_json_lines_say_what_a_table_says(home: Path) -> None:
    image = "photos/0/1/00013.jpg"
    lines = predicted(home, image, image, "--format", "json", "--top", "2").stdout.splitlines()
    assert len(lines) == 2
    found = json.loads(lines[0])
    assert (found["path"], found["confidence"]) == (image, "sigmoid")
    first, second = found["predictions"]
    assert first["probability"] >= second["probability"]
    assert first["class"] == f"class-{first['label']}"
    shown = predicted(home, image, "--format", "table", "--top", "2").stdout
    for expected in (image, "sigmoid", first["class"], f"{first['probability']:.4f}", second["class"], f"{second['probability']:.4f}"):
        assert expected in shown


def test_paths_come_from_standard_input(home: Path, tmp_path: Path) -> None:
    program, listed = tmp_path / "program.py", tmp_path / "paths"
    program.write_text(FROM_STANDARD_INPUT)
    listed.write_text("photos/2/4/00043.jpg\n\nphotos/0/0/00002.jpg\r\nphotos/missing.jpg\nphotos/0/0/00001.jpg")
    found = run(str(listed), "predict", "run", "-", "--top", "1", cwd=home, program=str(program))
    assert [row["path"] for row in rows(found.stdout)] == ["photos/2/4/00043.jpg", "photos/0/0/00002.jpg", "photos/0/0/00001.jpg"]
    assert found.stderr.splitlines() == [
        "warning: cannot read photos/missing.jpg (No such file or directory)",
        "error: of 4 files, 1 could not be read as an image",
    ]
    assert found.returncode == 1
    listed.write_text("\n")
    out = tmp_path / "found.csv"
    found = run(str(listed), "predict", "run", "-", "--out", str(out), cwd=home, program=str(program))
    assert not out.exists()
    assert (found.returncode, found.stderr) == (2, "error: no paths came on standard input; give one a line\n")


def test_an_interrupt_ends_it_at_once_also_while_it_waits_for_paths(home: Path, tmp_path: Path) -> None:
    program, fifo, out = tmp_path / "program.py", tmp_path / "paths", tmp_path / "found.csv"
    program.write_text(FROM_STANDARD_INPUT)
    out.write_text("from before")
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDWR)  # so that it never ends
    try:
        arguments = [str(fifo), "predict", "run", "-", "--out", str(out), "--overwrite"]
        process = begin(arguments, tmp_path / "output", program=str(program), cwd=home)
        os.write(held, b"photos/0/0/00000.jpg\n")
        wait_until(lambda: struct.unpack("i", fcntl.ioctl(held, termios.FIONREAD, b"\0" * 4))[0] == 0)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        assert finish(process, 20) == 130
    finally:
        os.close(held)
    assert "Traceback" not in (tmp_path / "output").read_text()
    assert out.read_text() == "from before"


def test_a_file_is_written_whole_also_beside_damaged_images(home: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes((home / "photos/0/0/00000.jpg").read_bytes()[:500])
    out = tmp_path / "found.jsonl"
    found = predicted(home, str(damaged), "photos/0/0", "--out", str(out))
    assert found.returncode == 1
    assert found.stdout == ""
    warning, error = found.stderr.splitlines()
    assert warning.startswith(f"warning: {damaged} is not a readable image: ")
    assert error == "error: of 11 files, 1 could not be read as an image"
    assert [json.loads(line)["path"] for line in out.read_text().splitlines()] == [f"photos/0/0/{i:05d}.jpg" for i in range(10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.jpg", "found.jsonl"]


def test_names_that_are_not_utf8_come_back_as_they_were(home: Path, tmp_path: Path) -> None:
    name = b"na\xefve, \xc3\xa9t\xc3\xa9.jpg"
    (tmp_path / "odd").mkdir()
    with open(bytes(tmp_path / "odd") + b"/" + name, "wb") as file:
        file.write((home / "photos/0/0/00000.jpg").read_bytes())
    out = tmp_path / "found.csv"
    assert predicted(home, str(tmp_path / "odd"), "--top", "1", "--out", str(out)).returncode == 0
    assert name in out.read_bytes()
    found = predicted(home, str(tmp_path / "odd"), "--top", "1", "--format", "json")
    assert json.loads(found.stdout)["path"].encode("utf-8", "surrogateescape").endswith(name)


def test_links_that_lead_back_are_followed_once_and_pipes_are_not_read(home: Path, tmp_path: Path) -> None:
    inner = tmp_path / "all" / "inner"
    inner.mkdir(parents=True)
    (inner / "a.jpg").write_bytes((home / "photos/0/0/00000.jpg").read_bytes())
    (inner / "back").symlink_to(tmp_path / "all", target_is_directory=True)
    (inner / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (inner / ".hidden.jpg").write_text("not an image")
    os.mkfifo(inner / "pipe.jpg")
    found = predicted(home, str(tmp_path / "all"), "--top", "1")
    assert [row["path"] for row in rows(found.stdout)] == [str(inner / "a.jpg")]
    assert f"cannot read {inner / 'gone.png'} (No such file or directory)" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere does not exist; name an image, a folder of images, or - for paths on standard input"),
        (["run"], "run holds no images (.jpg .jpeg"),
        (["-", "-"], "- stands for standard input, which can be read once: give it once"),
        (["photos", "--format", "xml"], "unknown format 'xml'; known: table, json, csv"),
        (["photos", "--top", "0"], "--top must be at least 1, not 0"),
        (["photos", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["photos", "--adjust-logits", "nan"], "--adjust-logits takes a τ from 0 on, such as 1, not nan"),
        (
            ["photos", "--out", "run/config.json"],
            "run/config.json is there already; add --overwrite to replace it",
        ),
        (["photos", "--out", "nowhere/found.csv"], "--out nowhere/found.csv lies in a folder that does not exist; make it first"),
        (["photos", "--average", "--checkpoint", "best"], "holds no moving average"),
        (["photos", "--checkpoint", "newest"], "unknown checkpoint 'newest'; known: last, best"),
        (["photos", "--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_every_mistake_is_one_sentence(home: Path, arguments: list[str], sentence: str) -> None:
    found = predicted(home, *arguments)
    assert found.returncode == 2
    assert sentence in found.stderr
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert found.stdout == ""


def test_a_checkpoint_that_is_a_file_cannot_be_another_one(home: Path) -> None:
    found = run("predict", "run/best.safetensors", "photos", "--checkpoint", "last", cwd=home)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: --checkpoint chooses one of a run folder, and run/best.safetensors is one already")
