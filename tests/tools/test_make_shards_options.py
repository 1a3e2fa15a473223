"""Every option of the command does what --help says, alone and with others."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import json
import os
import pickle
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipelines.format import ShardSet, open_shards
from pipelines.types import UserError
from tests.pipelines.conversion.test_resampling import dali_reads
from tests.pipelines.datasets.published import jpeg, write_list, write_tree
from tests.tools.conversions import (
    ALL_TRAIN,
    FOLDER,
    TOOL,
    digests,
    last_words,
    must_convert,
    photo_folder,
    refusal,
    start,
    tool_environment,
)

OUT = ("--out", "out")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return photo_folder(tmp_path / "photos", {"ant": 64, "bee": 16, "cat": 4})


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The command in this process: thirty refusals would take half a minute of imports otherwise."""
    before = signal.getsignal(signal.SIGTERM)
    spec = importlib.util.spec_from_file_location("make_shards_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    signal.signal(signal.SIGTERM, before)


def sizes(shards: ShardSet) -> set[tuple[int, int]]:
    """Height and width of every stored image, by decoding it."""
    split = shards.split("train")
    decoded = [Image.open(io.BytesIO(encoded.tobytes())).size for encoded in split.encoded(np.arange(len(split)))]
    assert [(width, height) for height, width in zip(split.heights_N, split.widths_N, strict=True)] == decoded
    return {(height, width) for width, height in decoded}


# ---- what is said


def test_dry_run_counts_and_writes_nothing(tmp_path: Path, photos: Path) -> None:
    before = digests(tmp_path)
    said = must_convert(*FOLDER, "--out", "deep/er/out", "--dry-run", "--shard-bytes", "16KiB", cwd=tmp_path)
    assert digests(tmp_path) == before
    assert not (tmp_path / "deep").exists()
    # A tenth of each class, rounded, at least one: 6 + 2 + 1 for test, the same for val.
    found = dict(re.findall(r"(train|val|test)\W+([\d,]+)\W", said))
    must_convert(*FOLDER, *OUT, "--shard-bytes", "16KiB", cwd=tmp_path)
    shards = open_shards(tmp_path / "out")
    assert found == {split: str(shards.num_samples(split)) for split in ("train", "val", "test")}
    assert re.search(r"about [\d.]+ kB in \d:\d\d:\d\d", said)
    assert "nothing was written" in said
    tar_bytes = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    estimated = float(re.search(r"about ([\d.]+) kB", said)[1]) * 1000  # type: ignore[index]
    assert 0.7 < estimated / tar_bytes < 1.1  # a tar ends in zeros up to a whole record, which small ones feel


def test_help_fits_into_80_columns(tmp_path: Path) -> None:
    said = must_convert("--help", cwd=tmp_path, variables={"COLUMNS": "80"})
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said.replace("1/N …", "")  # nothing is cut short
    for option in ("--dataset", "--imbalance-factor", "--effective-number-beta", "--on-error", "merge"):
        assert option in said
    assert "--out" in must_convert("merge", "--help", cwd=tmp_path, variables={"COLUMNS": "80"})


@pytest.mark.parametrize("processes", ["1", "2"])
def test_without_a_terminal_there_is_a_line_a_stage(tmp_path: Path, photos: Path, processes: str) -> None:
    said = must_convert(*ALL_TRAIN, *OUT, "--resample", "class-balanced", "--materialise", "--processes", processes, cwd=tmp_path)
    assert "\x1b" not in said
    assert "\r" not in said
    lines = said.splitlines()
    assert lines[0] == "folder: 3 classes; images: train 84, val 0, test 0; to out"
    assert re.match(r"shards: 84 of 84 images, [1-9][\d,]* images/s", lines[1])
    assert re.match(r"train-class-balanced: 84 of 84 images, [1-9][\d,]* images/s", lines[2])
    assert lines[-1] == "shards: out"


@pytest.mark.parametrize("width", [30, 80, 120])
def test_on_a_terminal_bars_keep_to_one_line(tmp_path: Path, width: int) -> None:
    photo_folder(tmp_path / "photos", {"ant": 300, "bee": 30})
    (tmp_path / "photos" / "ant" / "7.jpg").write_bytes(b"broken")
    arguments = (*ALL_TRAIN, *OUT, "--on-error", "skip", "--resample", "effective-number", "--materialise", "--processes", "2")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {name: value for name, value in tool_environment(TERM="xterm").items() if name not in ("COLUMNS", "NO_COLOR", "CI")}
    process = subprocess.Popen([sys.executable, TOOL, *arguments], cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    content = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            content += chunk
    except OSError:  # how Linux says that the other side is gone
        pass
    os.close(ours)
    assert process.wait() == 0
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", content.decode()).replace("\r", "\n").split("\n")
    bars = [line for line in lines if "━" in line and "images" not in line.split("━")[0] and "┏" not in line and "┡" not in line]
    assert bars
    assert max(map(len, bars)) <= width
    stages = {line.split()[0] for line in bars}
    assert len(stages) == 2
    assert all("330" in line or "329" in line for line in bars)
    if width >= 80:
        assert any("330/330" in line and "1 skipped" in line and "images/s" in line for line in bars)
        assert any("329/329" in line for line in bars)


# ---- what is taken


def test_limit(tmp_path: Path, photos: Path) -> None:
    must_convert(*FOLDER, *OUT, "--limit", "5", cwd=tmp_path)
    shards = open_shards(tmp_path / "out")
    assert [shards.num_samples(split) for split in ("train", "val", "test")] == [5, 5, 5]
    assert shards.manifest["options"]["limit"] == 5


def test_a_set_unlike_the_published_one_is_warned_of_or_refused(tmp_path: Path) -> None:
    names = [f"{half}/n0{wnid}/{half}{wnid}{number}.JPEG" for half in ("train", "val") for wnid in (0, 1) for number in (0, 1)]
    write_tree(tmp_path / "images", {name: jpeg(number) for number, name in enumerate(names)})
    for split, half, number in (("train", "train", 0), ("val", "train", 1), ("test", "val", 0)):
        write_list(tmp_path / f"ImageNet_LT_{split}.txt", [(f"{half}/n0{wnid}/{half}{wnid}{number}.JPEG", wnid) for wnid in (0, 1)])
    arguments = ("--dataset", "imagenet-lt", "--source", "images", *OUT)
    assert "ImageNet_LT_train.txt lists 2 images, 115,846 expected" in refusal(*arguments, "--strict", cwd=tmp_path)
    assert not (tmp_path / "out").exists()
    found = subprocess.run([sys.executable, TOOL, *arguments], cwd=tmp_path, env=tool_environment(), capture_output=True, text=True)
    assert found.returncode == 0
    assert all(line.startswith("warning: ") for line in found.stderr.splitlines())
    assert "115,846 expected" in found.stderr
    assert "1,000 expected" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "--dataset is missing; known: demo, folder"),
        ((*FOLDER, "--format", "ffcv"), "ask for wds,ffcv"),
        ((*FOLDER, "--format", "tar"), "unknown format 'tar'; known: wds, ffcv"),
        ((*FOLDER, "--format", ""), "unknown format ''"),
        ((*FOLDER, "--keep", "--min-side", "9"), "--keep and shrinking exclude each other"),
        ((*FOLDER, "--min-side", "9", "--max-side", "9"), "exclude each other"),
        ((*FOLDER, "--min-side", "0"), "must be at least 1 pixel, not 0"),
        ((*FOLDER, "--min-side", "9", "--no-validate"), "validation cannot be off"),
        ((*FOLDER, "--quality", "101"), "quality must lie in 1…100, not 101"),
        ((*FOLDER, "--out", ""), "--out is empty"),
        ((*FOLDER, "--limit", "0"), "--limit must be at least 1, not 0"),
        ((*FOLDER, "--processes", "0"), "processes must be at least 1, not 0"),
        ((*FOLDER, "--threads", "0"), "threads must be at least 1, not 0"),
        ((*FOLDER, "--executor", "slurm"), "unknown executor 'slurm'; known: local, ray"),
        ((*FOLDER, "--part", "2"), "'2' is not a part; write I/N, such as 2/8"),
        ((*FOLDER, "--part", "0/2"), "part 0/2 does not exist"),
        ((*FOLDER, "--part", "3/2"), "part 3/2 does not exist"),
        ((*FOLDER, "--resample", "balanced"), "unknown resampling 'balanced'; known: class-balanced"),
        ((*FOLDER, "--resample", "instance", "--resample", "instance"), "two resampled streams would be called 'instance'"),
        ((*FOLDER, "--resample", "power", "--resample-exponent", "11"), "must lie in [0, 10], not 11.0"),
        ((*FOLDER, "--resample", "instance", "--resample-exponent", "0.5"), "--resample-exponent is that of --resample power"),
        ((*FOLDER, "--effective-number-beta", "0.9"), "--effective-number-beta is that of --resample effective-number"),
        ((*FOLDER, "--resample", "instance", "--balanced-epoch-size", "0"), "epoch_size must lie in 1…"),
        ((*FOLDER, "--materialise"), "say which with --resample"),
        ((*FOLDER, "--balanced-epoch-size", "9"), "--balanced-epoch-size needs --resample"),
        ((*FOLDER, "--out", "ftq://x/y"), "fsspec knows no protocol 'ftq'"),
        ((*FOLDER, "--out", "s3://"), "names no bucket"),
        ((*FOLDER, "--out", "memory://x", "--resample", "instance"), "made from local shards"),
        (("merge", "--out", "nothing"), "there are no parts to merge at"),
        (("--dataset", "demo", "--source", "data", "--subset", "first"), "does not take subset; it takes source, imbalance_factor, seed"),
    ],
)
def test_options_that_cannot_be(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], sentence: str
) -> None:
    write_tree(tmp_path / "photos" / "ant", {"1.jpg": jpeg(1)})
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(tool.app, list(arguments))
    assert isinstance(found.exception, UserError), found.output
    assert sentence in str(found.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_refused_option_is_one_sentence(tmp_path: Path) -> None:
    assert refusal("--dataset", "demo", "--materialise", cwd=tmp_path).endswith("say which with --resample")


# ---- what becomes of it


def test_sides_and_quality(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, size in enumerate([(60, 40), (40, 60), (30, 30), (20, 50)] * 3):
        path = tmp_path / "photos" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path, quality=97)
    pixels, stored_bytes = {}, {}
    for name, options in {
        "kept": ("--keep",),
        "min": ("--min-side", "30"),
        "min, coarse": ("--min-side", "30", "--quality", "40"),
        "max": ("--max-side", "40"),
    }.items():
        must_convert(*ALL_TRAIN, "--out", name, *options, cwd=tmp_path)
        shards = open_shards(tmp_path / name)
        pixels[name] = sizes(shards)
        stored_bytes[name] = sum(len(encoded) for encoded in shards.split("train").encoded(np.arange(12)))
        recorded = shards.manifest["pixels"]
        mode = "keep" if name == "kept" else f"{name[:3]}-side"
        side = {"keep": None, "min-side": 30, "max-side": 40}[mode]
        quality = {"kept": 95, "min, coarse": 40}.get(name, 90)
        assert (recorded["mode"], recorded["side"], recorded["quality"]) == (mode, side, quality)
    assert pixels["kept"] == {(60, 40), (40, 60), (30, 30), (20, 50)}
    assert pixels["min"] == pixels["min, coarse"] == {(45, 30), (30, 45), (30, 30), (20, 50)}
    assert pixels["max"] == {(40, 27), (27, 40), (30, 30), (16, 40)}
    assert stored_bytes["kept"] > stored_bytes["min"] > stored_bytes["min, coarse"]


@pytest.mark.slow
def test_hands_do_not_show_in_the_bytes(tmp_path: Path, photos: Path) -> None:
    found = []
    ways = [("--processes", "1"), ("--processes", "3"), ("--processes", "2", "--threads", "4"), ("--format", "wds,wds")]
    for number, hands in enumerate(ways):
        must_convert(*FOLDER, "--out", f"out{number}", "--shard-bytes", "16KiB", *hands, cwd=tmp_path)
        found.append(digests(tmp_path / f"out{number}"))
    assert found[1:] == found[:1] * 3


def test_parts_then_merge_are_the_whole(tmp_path: Path, photos: Path) -> None:
    arguments = (*FOLDER, "--shard-bytes", "16KiB", "--resample", "class-balanced")
    must_convert(*arguments, "--out", "whole", cwd=tmp_path)
    said = must_convert(*arguments, *OUT, "--part", "2/3", cwd=tmp_path)
    assert "part 2/3 of out is done; when all are: make_shards.py merge --out out" in said
    assert "shards are not at" in refusal("merge", *OUT, cwd=tmp_path)
    assert "was started with other settings" in refusal(*arguments, *OUT, "--part", "1/3", "--seed", "9", cwd=tmp_path)
    running = [start(*arguments, *OUT, "--part", part, cwd=tmp_path) for part in ("1/3", "3/3")]
    for process in running:
        said_there = last_words(process)
        assert (process.returncode, said_there) == (0, "")
    assert "shards: out" in must_convert("merge", *OUT, cwd=tmp_path)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos", "whole"]
    must_convert("merge", *OUT, cwd=tmp_path)  # there is nothing left to do


def test_resampled_streams_have_exact_counts_and_dali_reads_them(tmp_path: Path, photos: Path) -> None:
    streams = ("--resample", "class-balanced", "--resample", "square-root", "--balanced-epoch-size", "126")
    said = must_convert(*ALL_TRAIN, *OUT, "--shard-bytes", "16KiB", *streams, cwd=tmp_path)
    assert "train, class-balanced" in said
    shards = open_shards(tmp_path / "out")
    found = {stream["name"]: stream for stream in shards.manifest["resampled"]}
    assert found["class-balanced"]["class_counts"] == [42, 42, 42]
    assert found["square-root"]["class_counts"] == [72, 36, 18]  # √64 : √16 : √4
    for stream in found.values():
        read = dali_reads(shards.root, stream["dali"]["file"])
        assert np.bincount([label for _, label in read]).tolist() == stream["class_counts"]
        order_E = np.load(shards.root / stream["order"]["file"]).astype(np.int64)
        assert [image for image, _ in read] == [encoded.tobytes() for encoded in shards.split("train").encoded(order_E)]
    must_convert(*ALL_TRAIN, "--out", "copied", "--shard-bytes", "16KiB", *streams, "--materialise", cwd=tmp_path)
    copied = json.loads((tmp_path / "copied" / "manifest.json").read_bytes())["resampled"]
    assert [stream["class_counts"] for stream in copied] == [[42, 42, 42], [72, 36, 18]]
    for stream in copied:
        assert sum(shard["num_samples"] for shard in stream["shards"]) == 126
        assert all((tmp_path / "copied" / shard["file"]).is_file() for shard in stream["shards"])


def test_local_urls_are_folders(tmp_path: Path, photos: Path) -> None:
    must_convert(*FOLDER, "--out", "path", cwd=tmp_path)
    for number, protocol in enumerate(("file", "local")):
        must_convert(*FOLDER, "--out", f"{protocol}://{tmp_path}/url{number}", cwd=tmp_path)
        assert digests(tmp_path / f"url{number}") == digests(tmp_path / "path")
    assert "in another" not in must_convert(*FOLDER, "--out", "memory://bucket/out", cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["path", "photos", "url0", "url1"]


def test_the_first_classes_of_cifar_alone(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", 500), ("test", 3)):
        content = {b"data": np.zeros((4 * count, 3072), np.uint8), b"fine_labels": [0, 1, 2, 3] * count}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"a", b"b", b"c", b"d"]}, protocol=2))
    command = ("--dataset", "cifar100-lt", "--source", "source", "--out", "shards")
    must_convert(*command, "--classes", "3", "--imbalance-factor", "25", cwd=tmp_path)
    shards = open_shards(tmp_path / "shards")
    assert shards.class_names == ("a", "b", "c")
    assert (shards.class_counts("train").tolist(), shards.class_counts("test").tolist()) == ([500, 100, 20], [3, 3, 3])
    assert shards.manifest["options"]["classes"] == 3
    assert "classes must be at most the 4 of cifar100-lt, not 5" in refusal(*command, "--classes", "5", cwd=tmp_path)
