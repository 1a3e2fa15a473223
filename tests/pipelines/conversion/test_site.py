"""What may be continued, replaced or refused at a place, and that two runs never write there at once."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TextIO

import pytest

from pipelines.conversion import Resampling, merge_parts, site
from pipelines.conversion.site import Site
from pipelines.format import PixelOptions
from pipelines.types import ShardError
from tests.pipelines.conversion.sources import (
    Progress,
    convert,
    die_after_writing,
    dies_at,
    digests,
    ended,
    identities,
    in_child,
    must_die,
    photo_folder,
)

COUNTS = {"train": {"ant": 14, "bee": 6}, "val": {"ant": 2}, "test": {"bee": 2}}
OLD_SEED = 7
NEW, OLD = "new", "old"
EXISTS, UNFINISHED, FOREIGN, STRAY = "exists already", "an unfinished", "not a shard folder", "which no conversion made"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"), COUNTS)


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder that stands ("old"), the one that is asked for ("new"), and one of it that is half done ("begun")."""
    root = tmp_path_factory.mktemp("made")
    convert(photos, root / "old", seed=OLD_SEED)
    convert(photos, root / "new")
    must_die(lambda: convert(photos, root / "begun", dies_at("shards", 12)))
    (root / "begun.partial").rename(root / "begun")
    assert len(list((root / "begun" / "units").iterdir())) == 1
    return {name: root / name for name in ("old", "new", "begun")}


def lay(out: Path, stands: str, begun: str, made: dict[str, Path]) -> None:
    """Brings about what the command finds."""
    partial = out.with_name("out.partial")
    if stands == "finished":
        shutil.copytree(made["old"], out)
    elif stands == "damaged":
        shutil.copytree(made["old"], out)
        (out / "manifest.json").write_text("{")
    elif stands == "empty":
        out.mkdir()
    elif stands == "photographs":
        out.mkdir()
        (out / "manifest.json").write_text('{"name": "holiday"}')
        (out / "holiday.jpg").write_bytes(b"mine")
    elif stands == "a file":
        out.write_text("mine")
    elif stands == "finished and mine":
        shutil.copytree(made["old"], out)
        (out / "notes.txt").write_text("mine")
    if begun == "units":
        shutil.copytree(made["begun"], partial)
    elif begun == "plan":
        partial.mkdir()
        (partial / "plan.json").write_text("of another conversion")
    elif begun == "complete":
        shutil.copytree(made["new"], partial)
    elif begun == "photographs":
        partial.mkdir()
        (partial / "holiday.jpg").write_bytes(b"mine")


# (what stands at OUT, what lies at OUT.partial): without options, --resume, --overwrite, both. NEW and OLD are what stands there
# afterwards, OLD because it is complete; anything else is in the sentence.
DECISIONS = {
    ("nothing", "nothing"): (NEW, NEW, NEW, NEW),
    ("nothing", "plan"): (NEW, NEW, NEW, NEW),
    ("nothing", "units"): (UNFINISHED, NEW, NEW, NEW),
    ("nothing", "complete"): (UNFINISHED, NEW, NEW, NEW),
    ("nothing", "photographs"): (STRAY, STRAY, STRAY, STRAY),
    ("empty", "nothing"): (EXISTS, NEW, NEW, NEW),
    ("finished", "nothing"): (EXISTS, OLD, NEW, NEW),
    ("finished", "plan"): (EXISTS, OLD, NEW, NEW),
    ("finished", "units"): (EXISTS, NEW, NEW, NEW),  # only a run with --overwrite can have left it
    ("finished", "complete"): (EXISTS, NEW, NEW, NEW),
    ("finished", "photographs"): (STRAY, STRAY, STRAY, STRAY),
    ("damaged", "nothing"): (EXISTS, EXISTS, NEW, NEW),
    ("damaged", "units"): (EXISTS, NEW, NEW, NEW),
    ("photographs", "nothing"): (FOREIGN, FOREIGN, FOREIGN, FOREIGN),
    ("photographs", "units"): (FOREIGN, FOREIGN, FOREIGN, FOREIGN),
    ("a file", "nothing"): (FOREIGN, FOREIGN, FOREIGN, FOREIGN),
    ("finished and mine", "nothing"): (STRAY, STRAY, STRAY, STRAY),
}
CASES = [
    pytest.param(*found, {"resume": number in (1, 3), "overwrite": number in (2, 3)}, result, id="-".join([*found, flags]))
    for found, results in DECISIONS.items()
    for number, (flags, result) in enumerate(zip(("none", "resume", "overwrite", "both"), results, strict=True))
]


@pytest.mark.parametrize(("stands", "begun", "flags", "result"), CASES)
def test_decision(
    photos: Path, made: dict[str, Path], tmp_path: Path, stands: str, begun: str, flags: dict[str, bool], result: str
) -> None:
    out = tmp_path / "out"
    lay(out, stands, begun, made)
    before = digests(tmp_path)
    kept = identities(tmp_path / "out.partial")
    if result == NEW:
        convert(photos, out, **flags)
        assert digests(out) == digests(made["new"])
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        # Resumed means that nothing is made twice; started over, that nothing is trusted.
        assert (kept.items() <= identities(out).items()) == (flags["resume"] or not kept)
        return
    if result == OLD:
        report = convert(photos, out, **flags)
        assert report is not None
        assert report.class_counts["train"].tolist() == [14, 6]
    else:
        with pytest.raises(ShardError, match=result):
            convert(photos, out, **flags)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("out", ["nested/new/out", "file", "dotted"])
def test_every_way_to_name_a_folder(photos: Path, made: dict[str, Path], tmp_path: Path, out: str) -> None:
    target = tmp_path / out
    named = {"file": f"file://{target}", "dotted": f"{tmp_path}/x/../dotted/"}.get(out, str(target))
    convert(photos, named)
    assert digests(target) == digests(made["new"])


def test_the_root_of_the_disk_is_refused(photos: Path) -> None:
    with pytest.raises(ShardError, match="root of the disk"):
        convert(photos, "/")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, None),  # the seed of the order is the caller's to record
        ({"limit": 5}, "the number of images"),
        ({"pixels": PixelOptions(quality=50)}, "what happens to images"),
        ({"resamplings": (Resampling(sampling="class-balanced"),)}, "the resampled streams"),
    ],
    ids=str,
)
def test_what_is_complete_is_only_resumed_by_the_same_command(
    photos: Path, made: dict[str, Path], tmp_path: Path, changes: dict[str, object], sentence: str | None
) -> None:
    shutil.copytree(made["new"], tmp_path / "out")
    if sentence is None:
        report = convert(photos, tmp_path / "out", resume=True, **changes)
        assert report is not None
        assert report.class_counts["train"].tolist() == [14, 6]
    else:
        with pytest.raises(ShardError, match=rf"is complete, but was made with other settings \({sentence} differ\)"):
            convert(photos, tmp_path / "out", resume=True, **changes)
    assert digests(tmp_path / "out") == digests(made["new"])


def test_records_go_before_their_plan(photos: Path, tmp_path: Path) -> None:
    """Killed while it starts over, a conversion must not leave shards that the next one takes for its own."""
    must_die(lambda: convert(photos, tmp_path / "out", dies_at("shards", 15), seed=OLD_SEED))
    unlink = os.unlink

    def killed() -> None:
        def unlink_and_die(path: object, **where: int) -> None:
            unlink(path, **where)  # type: ignore[call-overload]
            if str(path).endswith("plan.json"):
                os.kill(os.getpid(), signal.SIGKILL)

        os.unlink = unlink_and_die  # type: ignore[assignment]
        convert(photos, tmp_path / "out", overwrite=True)

    must_die(killed)
    assert (tmp_path / "out.partial").exists()
    assert not list((tmp_path / "out.partial").glob("units/*"))


# ---- two at once


@contextmanager
def halted(function: Callable[[Progress], object]) -> Iterator[None]:
    """A conversion in a process of its own that stands still in the middle while the block lasts, then ends well."""
    context = get_context("fork")
    reached, released = context.Event(), context.Event()

    def react(stage: str, done: int) -> None:
        if done >= 3:
            reached.set()
            assert released.wait(20)

    child = in_child(lambda: function(Progress(react)))
    try:
        assert reached.wait(20)
        yield
    finally:
        released.set()
        assert ended(child) == 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "_LOCK_PATIENCE_S", 0.2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_is_refused_while_the_first_goes_on(photos: Path, made: dict[str, Path], tmp_path: Path, processes: int) -> None:
    out = tmp_path / "out"
    with halted(lambda progress: convert(photos, out, progress, processes=processes)):
        for flags in ({}, {"resume": True}, {"overwrite": True}, {"part": (1, 2)}):
            with pytest.raises(ShardError, match=r"another run is writing .*out \(it holds .*out\.lock\); wait for it"):
                convert(photos, out, **flags)
        with pytest.raises(ShardError, match="another run is writing"):
            merge_parts(out)
    assert digests(out) == digests(made["new"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("impatient")
def test_parts_share_a_place_with_parts_only(photos: Path, made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with halted(lambda progress: convert(photos, out, progress, part=(1, 2))):
        with pytest.raises(ShardError, match=r"it holds .*out\.part-1-of-2\.lock"):
            convert(photos, out, part=(1, 2))
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ShardError, match=r"it holds .*out\.lock"):
                convert(photos, out, **flags)
        with pytest.raises(ShardError, match=r"it holds .*out\.lock"):
            merge_parts(out)
        convert(photos, out, part=(2, 2))
    merge_parts(out)
    assert digests(out) == digests(made["new"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_who_waited_for_a_lock_holds_the_one_that_others_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, removed, waited, leave = (threading.Event() for _ in range(4))
    flock = site._flock

    def late(file: TextIO, kind: int) -> bool:
        """The second to come has opened the file, but asks for the lock only when the first has removed it."""
        if threading.current_thread() is second:
            opened.set()
            removed.wait(5)
        return flock(file, kind)

    def wait_for_it() -> None:
        with Site(str(tmp_path / "out")).locked(""):
            waited.set()
            leave.wait(10)

    second = threading.Thread(target=wait_for_it)
    with monkeypatch.context() as patched:
        patched.setattr(site, "_flock", late)
        with Site(str(tmp_path / "out")).locked(""):
            second.start()
            assert opened.wait(5)
        removed.set()
        assert waited.wait(5)
    try:
        monkeypatch.setattr(site, "_LOCK_PATIENCE_S", 0.2)
        with pytest.raises(ShardError, match="another run is writing"), Site(str(tmp_path / "out")).locked(""):
            pass
    finally:
        leave.set()
        second.join()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_a_killed_run_left_is_no_obstacle(photos: Path, made: dict[str, Path], tmp_path: Path) -> None:
    def killed() -> None:
        die_after_writing("units/train-000000.json")
        convert(photos, tmp_path / "out", processes=2)

    must_die(killed)
    assert (tmp_path / "out.lock").exists()
    convert(photos, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(made["new"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
