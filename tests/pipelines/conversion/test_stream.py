"""Archives that can only be read from front to back: the samples of random access, interrupted at any point or not."""

from __future__ import annotations

import gzip
import hashlib
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipelines.conversion import WriteReport, merge_parts, plan, spool
from pipelines.datasets import DatasetOptions, open_dataset
from pipelines.format import open_shards
from pipelines.types import SPLITS, DatasetError, ShardError
from tests.pipelines.conversion.sources import (
    Progress,
    convert,
    die_after_writing,
    dies_at,
    digests,
    ended,
    identities,
    in_child,
    jpeg,
    must_die,
    orders_of,
)
from tests.pipelines.datasets.published import write_files_tar, write_list

COUNTS = {"train": (21, 9, 6), "test": (5, 4, 3)}
FOLDER = {"train": "t", "test": "v"}
ENTRIES = {
    split: [(f"train_val2018/g/{label}/{FOLDER[split]}{number}.jpg", label) for label in range(3) for number in range(counts[label])]
    for split, counts in COUNTS.items()
}
NAMES = [name for entries in ENTRIES.values() for name, _ in entries]
# Both splits mixed, in an order of the archive's own.
IMAGES = {NAMES[at]: jpeg(int(at)) for at in np.random.default_rng(3).permutation(len(NAMES))}
# Between them what is not listed, more than is read ahead.
MEMBERS: dict[str, bytes] = {}
for at, (name, image) in enumerate(IMAGES.items()):
    MEMBERS |= {f"other/{at}": bytes(100_000), name: image} if at % 16 == 0 else {name: image}
TOTAL = len(NAMES)
CHECKPOINT_EVERY = 8


def write_archive(path: Path, members: dict[str, bytes] = MEMBERS) -> Path:
    write_files_tar(path.with_suffix(".plain"), members)
    # Not compressed, so that a damaged byte stays one byte.
    path.write_bytes(gzip.compress(path.with_suffix(".plain").read_bytes(), compresslevel=0))
    path.with_suffix(".plain").unlink()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lists, the archive and the same tar unpacked from gzip."""
    root = tmp_path_factory.mktemp("inat")
    for split, name in (("train", "train"), ("test", "val")):
        write_list(root / f"iNaturalist18_{name}.txt", ENTRIES[split])
    write_archive(root / "images.tar.gz")
    write_files_tar(root / "images.tar", MEMBERS)
    return root


@pytest.fixture(autouse=True, scope="module")
def small_steps() -> Iterator[None]:
    """Else the archive would be over before the first checkpoint, and all of it read for the estimate."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(spool, "_CHECKPOINT_EVERY", CHECKPOINT_EVERY)
        monkeypatch.setattr(plan, "_PROBED", 4)
        yield


def convert_archive(archive: Path, out: Path | str, progress: Progress | None = None, **options: Any) -> WriteReport | None:
    lists = archive.parent if (archive.parent / "iNaturalist18_val.txt").exists() else archive.parent.parent
    dataset = open_dataset("inat18", DatasetOptions(source=archive, lists=lists))
    assert (dataset.stream is not None) == archive.name.endswith(".gz")
    return convert(dataset, out, progress, **options)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    progress = Progress()
    convert_archive(source / "images.tar.gz", out, progress)
    progress.assert_sound()
    assert progress.seen.keys() == {"archive", "shards"}
    assert progress.seen["archive"][-1] == progress.seen["shards"][-1] == (TOTAL, TOTAL)
    assert len(list(out.glob("train-*.tar"))) >= 5
    assert not list(out.rglob("*spool*"))
    return out


def mended(source: Path, folder: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The archive after `change` of its members, with the lists beside it."""
    shutil.copytree(source, folder)
    members = dict(MEMBERS)
    change(members)
    return write_archive(folder / "images.tar.gz", members)


def contents(folder: Path, split: str) -> list[tuple[bytes, int]]:
    samples = open_shards(folder).split(split)
    return list(zip((encoded.tobytes() for encoded in samples.encoded(np.arange(len(samples)))), samples.labels_N.tolist(), strict=True))


def test_the_same_samples_as_by_random_access(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    convert_archive(source / "images.tar", tmp_path / "random")
    for split in SPLITS:
        assert contents(undisturbed, split) == contents(tmp_path / "random", split)
    rows = orders_of(open_dataset("inat18", DatasetOptions(source=source / "images.tar", lists=source)))["train"]
    assert contents(undisturbed, "train") == [(IMAGES[ENTRIES["train"][row][0]], ENTRIES["train"][row][1]) for row in rows]


@pytest.mark.parametrize("hands", [{"processes": 2}, {"num_threads": 3}], ids=str)
def test_whoever_converts(source: Path, undisturbed: Path, tmp_path: Path, hands: dict[str, int]) -> None:
    convert_archive(source / "images.tar.gz", tmp_path / "out", **hands)
    assert digests(tmp_path / "out") == digests(undisturbed)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("done", [1, CHECKPOINT_EVERY + 3, TOTAL])
def test_killed_while_the_archive_is_read(source: Path, undisturbed: Path, tmp_path: Path, processes: int, done: int) -> None:
    archive = source / "images.tar.gz"
    must_die(lambda: convert_archive(archive, tmp_path / "out", dies_at("archive", done), processes=processes))
    assert not list((tmp_path / "out.partial").glob("*.tar"))
    progress = Progress()
    convert_archive(archive, tmp_path / "out", progress, processes=processes, resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)
    # What was checkpointed is neither read again nor counted twice.
    assert progress.seen["archive"][0][0] == done // CHECKPOINT_EVERY * CHECKPOINT_EVERY + 1 if done < TOTAL else True
    progress.assert_sound()


def test_killed_over_and_over(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    archive = source / "images.tar.gz"
    for done in range(5, TOTAL, 9):
        must_die(lambda done=done: convert_archive(archive, tmp_path / "out", dies_at("archive", done), resume=True))  # type: ignore[misc]
    convert_archive(archive, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("file", ["spool/state.json", "units/train-000001.json", "train.index.npy"])
def test_killed_between_shards(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, file: str
) -> None:
    def killed() -> None:
        if file == "spool/state.json":  # the last one
            spool._CHECKPOINT_EVERY = 10**9
            write_atomically = spool.write_atomically

            def write_and_die(path: Path, content: bytes) -> None:
                write_atomically(path, content)
                dies_at("", 0).react("", 0)

            spool.write_atomically = write_and_die  # type: ignore[attr-defined]
        die_after_writing(file)
        convert_archive(source / "images.tar.gz", tmp_path / "out", processes=processes)

    must_die(killed)
    made = identities(tmp_path / "out.partial")
    progress = Progress()
    convert_archive(source / "images.tar.gz", tmp_path / "out", progress, processes=processes, resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)
    assert "archive" not in progress.seen  # it was read once
    assert len(made.items() - identities(tmp_path / "out").items()) <= processes  # tars without a record


def test_an_archive_cut_short_is_continued_where_it_ended(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    archive = mended(source, tmp_path / "in", lambda members: None)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DatasetError, match=r"images\.tar\.gz is cut short or damaged .*: fetch it again"):
        convert_archive(archive, tmp_path / "out")
    archive.write_bytes(whole)
    progress = Progress()
    convert_archive(archive, tmp_path / "out", progress, resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)
    assert progress.seen["archive"][0][0] > TOTAL // 3
    progress.assert_sound()


def test_nothing_of_a_damaged_archive_is_kept(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    archive = mended(source, tmp_path / "in", lambda members: None)
    whole = archive.read_bytes()
    # One byte of pixels of the first image: it still decodes, and only the checksum at the archive's end knows.
    at = whole.index(next(iter(IMAGES.values()))[-40:]) + 10
    archive.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    progress = Progress()
    with pytest.raises(DatasetError, match=r"cut short or damaged .*CRC"):
        convert_archive(archive, tmp_path / "out", progress)
    assert progress.seen["archive"][-1][0] > TOTAL // 2
    assert not (tmp_path / "out.partial").exists()
    archive.write_bytes(whole)
    convert_archive(archive, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_an_image_that_does_not_decode_stops_or_is_skipped(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    broken = ENTRIES["train"][7][0]
    archive = mended(source, tmp_path / "in", lambda members: members.update({broken: b"\xff\xd8\xff broken"}))
    with pytest.raises(DatasetError, match=rf"images\.tar\.gz!{broken} is not a readable image.*--on-error skip, then --resume"):
        convert_archive(archive, tmp_path / "out")
    shutil.copytree(tmp_path / "out.partial", tmp_path / "mended.partial")
    progress = Progress()
    report = convert_archive(archive, tmp_path / "out", progress, on_error="skip", resume=True)
    progress.assert_sound()
    assert report is not None
    assert (report.num_skipped, len(report.skipped)) == (1, 1)
    assert report.skipped[0].startswith(f"{archive}!{broken} is not a readable image")
    assert contents(tmp_path / "out", "train") == [sample for sample in contents(undisturbed, "train") if sample[0] != IMAGES[broken]]
    write_archive(archive)
    convert_archive(archive, tmp_path / "mended", resume=True)
    assert digests(tmp_path / "mended") == digests(undisturbed)


def test_parts_read_the_archive_each_for_itself(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    archive = source / "images.tar.gz"
    must_die(lambda: convert_archive(archive, tmp_path / "out", dies_at("archive", 7), part=(2, 2)))
    for number in (1, 2):
        progress = Progress()
        convert_archive(archive, tmp_path / "out", progress, part=(number, 2))
        progress.assert_sound()
    assert not list((tmp_path / "out.partial").glob("spool*"))
    merge_parts(tmp_path / "out")
    assert digests(tmp_path / "out") == digests(undisturbed)


@pytest.mark.parametrize("number", [1, 2])
def test_what_a_part_has_skipped_is_counted_once(source: Path, tmp_path: Path, number: int) -> None:
    archive = mended(source, tmp_path / "in", lambda members: members.update({ENTRIES["train"][7][0]: b""}))
    convert_archive(archive, tmp_path / "out", part=(number, 2), on_error="skip")
    progress = Progress()
    report = convert_archive(archive, tmp_path / "out", progress, resume=True, on_error="skip")
    progress.assert_sound()
    assert progress.seen["archive"][-1] == (TOTAL, TOTAL)
    assert report is not None
    assert report.num_skipped == 1


@pytest.mark.parametrize("limit", [1, 5, 20])
def test_a_limit_takes_the_same_samples(source: Path, tmp_path: Path, limit: int) -> None:
    convert_archive(source / "images.tar", tmp_path / "random", limit=limit)
    progress = Progress()
    convert_archive(source / "images.tar.gz", tmp_path / "out", progress, limit=limit)
    progress.assert_sound()
    for split in SPLITS:
        assert contents(tmp_path / "out", split) == contents(tmp_path / "random", split)
    assert len(contents(tmp_path / "out", "train")) == limit


@pytest.mark.parametrize("most", [1, 4])
def test_more_shards_than_files_may_be_open(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(spool, "_MAX_OPEN", most)
    archive, small = source / "images.tar.gz", {"shard_bytes": 1 << 10}  # a shard for every image

    def limited() -> None:
        files = len(list(Path("/proc/self/fd").iterdir())) + most + 15
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        convert_archive(archive, tmp_path / "out", resume=True, **small)

    must_die(lambda: convert_archive(archive, tmp_path / "out", dies_at("archive", 20), **small))
    assert ended(in_child(limited)) == 0
    convert_archive(archive, tmp_path / "undisturbed", **small)
    assert len(list((tmp_path / "out").glob("*.tar"))) == TOTAL
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


def test_spool_files_go_as_their_shards_come(source: Path, tmp_path: Path) -> None:
    partial, most = tmp_path / "out.partial", []

    def react(stage: str, done: int) -> None:
        if stage == "shards":
            records = {path.stem for path in (partial / "units").glob("*.json")}
            most.append(len(records & {path.name for path in (partial / "spool").iterdir()}))

    convert_archive(source / "images.tar.gz", tmp_path / "out", Progress(react), processes=1)
    assert len(most) > TOTAL // 2
    assert max(most) == 0


@pytest.mark.parametrize("damage", ["gone", "cut short", "of other samples"])
def test_a_damaged_spool_file_is_named(source: Path, tmp_path: Path, damage: str) -> None:
    archive, folder = source / "images.tar.gz", tmp_path / "out.partial" / "spool"
    must_die(lambda: convert_archive(archive, tmp_path / "out", dies_at("shards", 1)))
    path = folder / "train-000002"
    if damage == "gone":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        shutil.copy(folder / "train-000003", path)
    with pytest.raises(ShardError, match=r"spool/train-000002.*: start over with --overwrite"):
        convert_archive(archive, tmp_path / "out", resume=True)


def test_a_spool_of_another_plan_is_not_taken(source: Path, tmp_path: Path) -> None:
    archive = source / "images.tar.gz"
    must_die(lambda: convert_archive(archive, tmp_path / "other", dies_at("shards", 1), seed=1))
    must_die(lambda: convert_archive(archive, tmp_path / "out", dies_at("archive", 20)))
    shutil.rmtree(tmp_path / "out.partial" / "spool")
    (tmp_path / "other.partial" / "spool").rename(tmp_path / "out.partial" / "spool")
    convert_archive(archive, tmp_path / "out", resume=True)
    convert_archive(archive, tmp_path / "fresh")
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_spools_of_a_remote_output_lie_in_a_temporary_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    memory = fsspec.filesystem("memory")

    def interrupt(stage: str, done: int) -> None:
        if done == TOTAL - 1:
            raise KeyboardInterrupt

    archive, out = source / "images.tar.gz", "memory://spooled"
    try:
        with pytest.raises(KeyboardInterrupt):
            convert_archive(archive, out, Progress(interrupt))
        spools = list(tmp_path.glob("bce3s-spool-*"))
        assert len(spools) == 1
        assert spools[0].stat().st_mode & 0o77 == 0
        with pytest.raises(ShardError, match="an unfinished conversion lies at memory://spooled"):
            convert_archive(archive, out)
        progress = Progress()
        convert_archive(archive, out, progress, resume=True)
        assert progress.seen["archive"][0][0] > CHECKPOINT_EVERY
        assert list(tmp_path.iterdir()) == []
        convert_archive(archive, tmp_path / "out")
        stored = {name.removeprefix("/spooled/"): hashlib.sha256(memory.cat(name)).hexdigest() for name in memory.find("/spooled")}
        assert stored == digests(tmp_path / "out")
        with pytest.raises(KeyboardInterrupt):
            convert_archive(archive, out, Progress(interrupt), seed=1, overwrite=True)
        convert_archive(archive, out, overwrite=True)  # starts over: nothing of the other order is taken
        stored = {name.removeprefix("/spooled/"): hashlib.sha256(memory.cat(name)).hexdigest() for name in memory.find("/spooled")}
        assert stored == digests(tmp_path / "out")
    finally:
        memory.rm("/spooled", recursive=True)
