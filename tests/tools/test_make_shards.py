"""The converter as a user runs it: a real process, real images, one sentence for each mistake, nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.format import open_shards
from tests.tools.conversions import ROOT, digests, photo_folder
from tests.tools.conversions import convert as run


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    out = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(shared_data / "unpack.py"), "cifar10", str(out)], check=True, capture_output=True)
    return out


@pytest.mark.slow  # 22,000 images; test_cifar_lt.py opens the same pickles in the fast suite
def test_cifar10_lt_from_the_real_images(cifar10: Path, tmp_path: Path) -> None:
    found = run("--dataset", "cifar10-lt", "--source", str(cifar10), "--out", "shards/c10", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "12,406" in found.stdout
    assert "imbalance factor 100" in found.stdout
    shards = open_shards(tmp_path / "shards" / "c10")
    assert shards.class_counts("train").tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert shards.class_names[0] == "airplane"
    again = run("--dataset", "cifar10-lt", "--source", str(cifar10), "--out", "again", cwd=tmp_path)
    assert again.returncode == 0
    assert digests(tmp_path / "again") == digests(shards.root)


def test_folder_of_photographs_keeps_every_byte(shared_data: Path, tmp_path: Path) -> None:
    photos = sorted((shared_data / "photos").glob("*.JPEG"))[:30]
    for number, photo in enumerate(photos):
        folder = tmp_path / "photos" / ("few" if number < 10 else "more")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / photo.name).symlink_to(photo)
    found = run("--dataset", "folder", "--source", "photos", "--out", "out", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    shards = open_shards(tmp_path / "out")
    assert [shards.num_samples(split) for split in ("train", "val", "test")] == [24, 3, 3]
    stored = {
        encoded.tobytes()
        for split in ("train", "val", "test")
        for encoded in shards.split(split).encoded(np.arange(shards.num_samples(split)))
    }
    assert stored == {photo.read_bytes() for photo in photos}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dataset", "imagenet"], "unknown dataset 'imagenet'; known: demo, folder, cifar10-lt, cifar100-lt"),
        (["--dataset", "folder"], "--source"),
        (["--dataset", "folder", "--source", "absent"], "absent"),
        (["--dataset", "folder", "--source", "empty"], "empty"),
        (["--dataset", "cifar10-lt", "--source", "empty"], "empty"),
        (["--dataset", "folder", "--source", "photos", "--imbalance-factor", "0.01"], "must be >= 1"),
        (["--dataset", "folder", "--source", "photos", "--val-per-class", "3"], "val_per_class"),
        (["--dataset", "folder", "--source", "photos", "--shard-bytes", "many"], "'many' is not a size"),
        (["--dataset", "folder", "--source", "photos", "--shard-bytes", "1"], "shard_bytes must be at least 1024"),
        (["--dataset", "folder", "--source", "photos", "--on-error", "ignore"], "unknown on_error 'ignore'; known: stop, skip"),
        (["--dataset", "folder", "--source", "photos", "--out", "empty"], "exists already; add --overwrite"),
        (["--dataset", "folder", "--source", "photos", "--out", "photos", "--overwrite"], "lie in one another"),
        (["--dataset", "folder", "--source", "photos", "--out", "broken", "--overwrite"], "broken is not a shard folder"),
        (["--dataset", "folder", "--source", "photos", "--shard-bytes", "inf"], "'inf' is not a size"),
        (["--dataset", "folder", "--source", "broken"], "cat/1.jpg is not a readable image"),
        (["--dataset", "folder", "--source", "photos", "--out", "file/out"], "cannot write shards to"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    photo_folder(tmp_path / "photos", {"ant": 12, "bee": 10})
    photo_folder(tmp_path / "broken", {"ant": 12, "cat": 12})
    (tmp_path / "broken" / "cat" / "1.jpg").write_bytes((tmp_path / "broken" / "cat" / "0.jpg").read_bytes()[:300])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    found = run(*arguments, cwd=tmp_path)
    assert found.returncode != 0
    assert "Traceback" not in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1, found.stderr
    assert sentence in found.stderr
    after = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in after if name not in before and name != "shards"] == []
    # Shards that were finished before the mistake was met wait for --resume.
    assert not (tmp_path / "shards").exists() or all(path.name.endswith(".partial") for path in (tmp_path / "shards").iterdir())


def test_skipping_names_and_counts_what_does_not_decode(tmp_path: Path) -> None:
    photo_folder(tmp_path / "photos", {"ant": 12, "bee": 12})
    broken = tmp_path / "photos" / "bee" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    found = run("--dataset", "folder", "--source", "photos", "--out", "out", "--on-error", "skip", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "bee/3.jpg is not a readable image" in found.stdout
    assert "1 images skipped" in found.stdout
    shards = open_shards(tmp_path / "out")
    assert sum(shards.num_samples(split) for split in ("train", "val", "test")) == 23


def test_kill_9_leaves_no_shards_and_the_next_run_is_whole(tmp_path: Path) -> None:
    photo_folder(tmp_path / "photos", {"ant": 700, "bee": 700}, size=160)
    arguments = [sys.executable, str(ROOT / "tools" / "make_shards.py"), "--dataset", "folder", "--source", "photos", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/*.tar")) and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    found = run("--dataset", "folder", "--source", "photos", "--out", "out", "--resume", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert open_shards(tmp_path / "out").num_samples("train") == 1120
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]
