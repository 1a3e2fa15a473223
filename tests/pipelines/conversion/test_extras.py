"""Resampled streams and betons that are made from finished tars: right, and the same however often the making was interrupted."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.conversion import Resampling, finish, site
from pipelines.conversion.site import Site
from pipelines.format import ShardSplit, open_shards
from pipelines.types import ShardError
from tests.pipelines.conversion.sources import (
    Progress,
    convert,
    die_after_writing,
    dies_at,
    digests,
    must_die,
    photo_folder,
)

STREAMS = (
    Resampling(sampling="class-balanced", epoch_size=70, materialised=True),
    Resampling(sampling="square-root", seed=3),
    Resampling(sampling="power", exponent=0.5, materialised=True),
)
MATERIALISED = "train-class-balanced"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = photo_folder(tmp_path_factory.mktemp("photos"))
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "train" / "cat" / "a.png")
    return root


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    progress = Progress()
    convert(photos, out, progress, resamplings=STREAMS, processes=2)
    progress.assert_sound()
    assert progress.seen[MATERIALISED][-1] == (70, 70)
    return out


def test_a_materialised_stream_holds_the_training_samples(undisturbed: Path) -> None:
    shards = open_shards(undisturbed)
    train = shards.split("train")
    entry = next(stream for stream in shards.manifest["resampled"] if stream["name"] == "class-balanced")
    stream = ShardSplit(undisturbed, MATERIALISED, entry)
    assert len(stream) == entry["epoch_size"] == 70
    assert np.bincount(stream.labels_N).tolist() == entry["class_counts"]
    assert max(entry["class_counts"]) - min(entry["class_counts"]) <= 1
    of_train = {encoded.tobytes(): number for number, encoded in enumerate(train.encoded(np.arange(len(train))))}
    drawn = [of_train[encoded.tobytes()] for encoded in stream.encoded(np.arange(70))]
    assert stream.labels_N.tolist() == train.labels_N[drawn].tolist()
    assert stream.heights_N.tolist() == train.heights_N[drawn].tolist()
    uses = np.bincount(drawn, minlength=len(train))
    for label in range(3):  # each class's samples equally often
        assert np.ptp(uses[train.labels_N == label]) <= 1
    assert len(entry["shards"]) > 2
    assert [shard["file"] for shard in entry["shards"]] == sorted(path.name for path in undisturbed.glob(f"{MATERIALISED}-*.tar"))
    for shard_bytes in (shard["shard_bytes"] for shard in entry["shards"]):
        assert shard_bytes <= 32 << 10


def test_png_stays_png(undisturbed: Path) -> None:
    entry = open_shards(undisturbed).manifest["resampled"][0]
    stream = ShardSplit(undisturbed, MATERIALISED, entry)
    kinds = set()
    for sample_id, encoded in enumerate(stream.encoded(np.arange(len(stream)))):
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            kinds.add((image.format, (image.height, image.width) == (stream.heights_N[sample_id], stream.widths_N[sample_id])))
    assert kinds == {("JPEG", True), ("PNG", True)}
    names = b"".join((undisturbed / shard["file"]).read_bytes() for shard in entry["shards"])
    assert b".png\0" in names


def test_one_process_or_two(photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "out", resamplings=STREAMS)
    assert digests(tmp_path / "out") == digests(undisturbed)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("done", [1, 30, 70])
def test_killed_between_materialised_tars(photos: Path, undisturbed: Path, tmp_path: Path, processes: int, done: int) -> None:
    must_die(lambda: convert(photos, tmp_path / "out", dies_at(MATERIALISED, done), resamplings=STREAMS, processes=processes))
    finished = len(list((tmp_path / "out.partial" / "units").glob(f"{MATERIALISED}-*.json")))
    progress = Progress()
    convert(photos, tmp_path / "out", progress, resamplings=STREAMS, processes=processes, resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)
    progress.assert_sound()
    assert "shards" not in progress.seen
    if finished and MATERIALISED in progress.seen:
        assert progress.seen[MATERIALISED][0][0] > 1


@pytest.mark.parametrize(
    "file", ["train.index.npy", f"units/{MATERIALISED}-000001.json", f"{MATERIALISED}.index.npy", "train-power-0.5.index.npy"]
)
def test_killed_right_after_a_file(photos: Path, undisturbed: Path, tmp_path: Path, file: str) -> None:
    def killed() -> None:
        die_after_writing(file)
        convert(photos, tmp_path / "out", resamplings=STREAMS, processes=2)

    must_die(killed)
    convert(photos, tmp_path / "out", resamplings=STREAMS, resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_killed_between_manifest_and_name(photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    def killed() -> None:
        Site.publish = lambda self: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        convert(photos, tmp_path / "out", resamplings=STREAMS)

    must_die(killed)
    assert json.loads((tmp_path / "out.partial" / "manifest.json").read_bytes())["format"] == "bce3s-shards"
    with pytest.raises(ShardError, match="an unfinished conversion lies at"):
        convert(photos, tmp_path / "out", resamplings=STREAMS)
    convert(photos, tmp_path / "out", resamplings=STREAMS, resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_while_what_only_the_making_needs_is_removed(photos: Path, undisturbed: Path, tmp_path: Path) -> None:
    def killed() -> None:
        site.publish_folder = lambda finished, out: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[attr-defined]
        convert(photos, tmp_path / "out", resamplings=STREAMS)

    must_die(killed)
    assert not (tmp_path / "out.partial" / "plan.json").exists()
    convert(photos, tmp_path / "out", resamplings=STREAMS, resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)


@pytest.fixture(scope="module")
def with_betons(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ffcv", reason="betons need FFCV")
    out = tmp_path_factory.mktemp("betons") / "out"
    progress = Progress()
    convert(photos, out, progress, formats=("wds", "ffcv"), processes=2)
    progress.assert_sound()
    assert sorted(path.name for path in out.glob("*.beton")) == ["test.beton", "train.beton", "val.beton"]
    return out


class TestBetons:
    @pytest.mark.parametrize("split", ["train", "val", "test"])
    def test_killed_after_a_beton(self, photos: Path, with_betons: Path, tmp_path: Path, split: str) -> None:
        def killed() -> None:
            die_after_writing(f"units/{split}.beton.json")
            convert(photos, tmp_path / "out", formats=("wds", "ffcv"), processes=2)

        must_die(killed)
        made = (tmp_path / "out.partial" / f"{split}.beton").stat().st_ino
        convert(photos, tmp_path / "out", formats=("wds", "ffcv"), resume=True)
        assert digests(tmp_path / "out") == digests(with_betons)
        assert (tmp_path / "out" / f"{split}.beton").stat().st_ino == made

    @pytest.mark.parametrize("done", [1, 41])
    def test_killed_within_a_beton(self, photos: Path, with_betons: Path, tmp_path: Path, done: int) -> None:
        must_die(lambda: convert(photos, tmp_path / "out", dies_at("train.beton", done), formats=("wds", "ffcv")))
        convert(photos, tmp_path / "out", formats=("wds", "ffcv"), resume=True)
        assert digests(tmp_path / "out") == digests(with_betons)

    def test_a_finished_folder_without_betons_is_not_said_to_have_them(self, photos: Path, tmp_path: Path) -> None:
        pytest.importorskip("ffcv", reason="betons need FFCV")
        convert(photos, tmp_path / "out")
        with pytest.raises(ShardError, match=r"complete, but was made with other settings \(the formats differ\)"):
            convert(photos, tmp_path / "out", formats=("wds", "ffcv"), resume=True)


def test_workers_map_the_tars_themselves() -> None:
    """What goes to a cluster with the job must not be the images."""
    samples = finish._TarSamples(folder=Path("absent"), train={"shards": []}, order_E=np.arange(5))
    assert len(pickle.dumps(samples)) < 1000
