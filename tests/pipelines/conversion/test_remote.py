"""Shards written to a store by URL are those of a local folder, file for file, and are no shard folder before the manifest comes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import pytest

from pipelines.conversion import Resampling, merge_parts
from pipelines.conversion.site import Site
from pipelines.store import RemoteStore
from pipelines.types import ConfigError, DatasetError, ShardError
from tests.object_store import BUCKET, S3, running_s3_or_skip, use, user_environment
from tests.pipelines.conversion.sources import (
    Progress,
    convert,
    dies_at,
    digests,
    must_die,
    opened,
    photo_folder,
    source_file,
)

COUNTS = {"train": {"ant": 13, "bee": 6}, "val": {"ant": 2}, "test": {"bee": 2}}
ROWS = sum(COUNTS["train"].values())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"), COUNTS)


@pytest.fixture(scope="module")
def local(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("local") / "out"
    convert(photos, out)
    found = digests(out)
    assert "train-000002.tar" in found
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    yield from running_s3_or_skip("moto")


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    use(monkeypatch, server.environment)
    return server


@pytest.fixture
def memory() -> Iterator[Callable[[], dict[str, str]]]:
    """Digests of what lies under memory://out, names as they are stored."""
    filesystem = fsspec.filesystem("memory")

    def look() -> dict[str, str]:
        return {name.removeprefix("/out/"): hashlib.sha256(filesystem.cat(name)).hexdigest() for name in filesystem.find("/out")}

    yield look
    if filesystem.exists("/out"):
        filesystem.rm("/out", recursive=True)


def stored(s3: S3, prefix: str) -> dict[str, str]:
    """The same of a bucket, past the code under test."""
    with closing(s3.client()) as client:
        names = [entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])]
        contents = {name: client.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in names}
    return {name.removeprefix(f"{prefix}/"): hashlib.sha256(content).hexdigest() for name, content in contents.items()}


class TestS3:
    @pytest.mark.parametrize("processes", [1, 2])
    def test_the_files_of_a_local_folder(self, photos: Path, local: dict[str, str], s3: S3, processes: int) -> None:
        progress = Progress()
        report = convert(photos, f"s3://{BUCKET}/whole-{processes}", progress, processes=processes)
        assert stored(s3, f"whole-{processes}") == local
        progress.assert_sound()
        assert report is not None
        assert report.class_counts["train"].tolist() == [13, 6]

    def test_killed_and_resumed_by_another_process(self, photos: Path, local: dict[str, str], s3: S3) -> None:
        out = f"s3://{BUCKET}/killed"
        must_die(lambda: convert(photos, out, dies_at("shards", 15), processes=2))
        before = stored(s3, "killed")
        assert "manifest.json" not in before
        assert any(name.startswith("units/") for name in before)
        with pytest.raises(ShardError, match=rf"an unfinished conversion lies at {out}: --resume continues it"):
            convert(photos, out)
        convert(photos, out, resume=True, processes=2)
        assert stored(s3, "killed") == local

    def test_parts_and_their_merge(self, photos: Path, local: dict[str, str], s3: S3) -> None:
        out = f"s3://{BUCKET}/parts"
        convert(photos, out, part=(2, 2))
        with pytest.raises(ShardError, match=rf"\d of \d shards are not at {out} yet"):
            merge_parts(out)
        convert(photos, out, part=(1, 2))
        merge_parts(out)
        assert stored(s3, "parts") == local

    def test_a_wrong_bucket_or_server_is_a_sentence(self, photos: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ShardError, match=r"there is no bucket for s3://absent/out"):
            convert(photos, "s3://absent/out")
        use(monkeypatch, user_environment("http://127.0.0.1:1"))
        with pytest.raises(ShardError, match=r"s3://.*check the network and the address"):
            convert(photos, f"s3://{BUCKET}/out")

    def test_a_store_that_fails_is_not_one_that_lacks_shards(self, photos: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        out = f"s3://{BUCKET}/failing"
        for number in (1, 2):
            convert(photos, out, part=(number, 2))
        with closing(s3.client()) as client:
            listed = client.list_objects_v2(Bucket=BUCKET, Prefix="failing/")["KeyCount"]

        def fail(self: RemoteStore, name: str) -> bytes:
            if name.startswith("units/"):
                raise ShardError(f"cannot read {name} (timeout): check the network")
            return read_bytes(self, name)

        read_bytes = RemoteStore.read_bytes
        monkeypatch.setattr(RemoteStore, "read_bytes", fail)
        with pytest.raises(ShardError, match="timeout"):
            merge_parts(out)
        with closing(s3.client()) as client:
            assert client.list_objects_v2(Bucket=BUCKET, Prefix="failing/")["KeyCount"] == listed


class TestMemory:
    Look = Callable[[], dict[str, str]]

    def test_the_files_of_a_local_folder(self, photos: Path, local: dict[str, str], memory: Look) -> None:
        convert(photos, "memory://out", processes=2)  # which one process does: others would not see it
        assert memory() == local

    def test_the_manifest_is_the_last_file_of_the_shards(self, photos: Path, memory: Look, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[str] = []
        write_bytes = RemoteStore.write_bytes

        def write(self: RemoteStore, name: str, content: bytes) -> None:
            assert "manifest.json" not in memory()
            written.append(name)
            write_bytes(self, name, content)

        monkeypatch.setattr(RemoteStore, "write_bytes", write)
        convert(photos, "memory://out")
        assert written[-1] == "manifest.json"

    def test_resumed_after_an_image_that_did_not_decode(self, tmp_path: Path, local: dict[str, str], memory: Look) -> None:
        photos = photo_folder(tmp_path / "photos", COUNTS)
        broken = source_file(photos, ROWS - 1)
        whole = broken.read_bytes()
        broken.write_bytes(b"")
        with pytest.raises(DatasetError, match=broken.name):
            convert(photos, "memory://out")
        before = memory()
        assert "units/train-000000.json" in before
        assert "manifest.json" not in before
        broken.write_bytes(whole)
        convert(photos, "memory://out", resume=True)
        assert memory() == local

    def test_what_stands_there_is_kept_unless_it_is_to_be_replaced(self, photos: Path, local: dict[str, str], memory: Look) -> None:
        convert(photos, "memory://out", seed=1, limit=9)
        before = memory()
        with pytest.raises(ShardError, match="memory://out exists already; add --overwrite"):
            convert(photos, "memory://out")
        with pytest.raises(ShardError, match=r"memory://out is complete, but was made with other settings \(the number of images differ\)"):
            convert(photos, "memory://out", resume=True)
        for number in (1, 2):
            with pytest.raises(ShardError, match="no part may replace"):
                convert(photos, "memory://out", part=(number, 2), overwrite=True)
        assert memory() == before
        convert(photos, "memory://out", overwrite=True)
        assert memory() == local

    @pytest.mark.parametrize("resume", [False, True])
    def test_replacing_takes_the_manifest_first_and_leaves_nothing_old(
        self, photos: Path, local: dict[str, str], memory: Look, resume: bool
    ) -> None:
        convert(photos, "memory://out", seed=1, shard_bytes=4 << 10)
        assert len(memory()) > len(local)

        def interrupt(stage: str, done: int) -> None:
            if done == 12:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(photos, "memory://out", Progress(interrupt), overwrite=True, resume=resume)
        assert "manifest.json" not in memory()  # or readers would mix old and new
        convert(photos, "memory://out", resume=True)
        assert memory() == local

    def test_starting_over_removes_the_manifest_first_and_the_plan_last(
        self, photos: Path, memory: Look, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However far it comes, a manifest has all its shards, and no record outlives its plan."""
        removed: list[str] = []
        delete = RemoteStore.delete

        def remember(self: RemoteStore, name: str) -> None:
            removed.append(name)
            delete(self, name)

        convert(photos, "memory://out")
        convert(photos, "memory://elsewhere", part=(1, 2))
        for name in ("plan.json", "units/train-000000.json"):
            fsspec.filesystem("memory").pipe(f"/out/{name}", fsspec.filesystem("memory").cat(f"/elsewhere/{name}"))
        fsspec.filesystem("memory").rm("/elsewhere", recursive=True)
        monkeypatch.setattr(RemoteStore, "delete", remember)
        Site("memory://out").clear()
        assert (removed[0], removed[-1]) == ("manifest.json", "plan.json")
        assert "units/train-000000.json" in removed
        assert memory() == {}

    @pytest.mark.parametrize("name", ["holiday.jpg", "manifest.json", "deep/holiday.jpg"])
    def test_other_peoples_files_are_not_removed(self, photos: Path, memory: Look, name: str) -> None:
        fsspec.filesystem("memory").pipe(f"/out/{name}", b'{"name": "holiday"}')
        before = memory()
        for flags in ({}, {"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True}):
            with pytest.raises(ShardError, match="memory://out is not a shard folder"):
                convert(photos, "memory://out", **flags)
        assert memory() == before

    @pytest.mark.parametrize("unfinished", [True, False])
    def test_nor_those_among_shards(self, photos: Path, memory: Look, unfinished: bool) -> None:
        if unfinished:
            convert(photos, "memory://out", part=(1, 2))
        else:
            convert(photos, "memory://out")
        fsspec.filesystem("memory").pipe("/out/holiday.jpg", b"mine")
        before = memory()
        with pytest.raises(ShardError, match=r"memory://out holds holiday\.jpg, which no conversion made"):
            convert(photos, "memory://out", overwrite=True)
        assert memory() == before

    @pytest.mark.parametrize("how", ["again", "merge"])
    def test_killed_while_the_records_are_removed(
        self, photos: Path, local: dict[str, str], memory: Look, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        delete = RemoteStore.delete

        def interrupted(self: RemoteStore, name: str) -> None:
            if name == "units/train-000001.json" and "manifest.json" in memory():
                raise KeyboardInterrupt
            delete(self, name)

        monkeypatch.setattr(RemoteStore, "delete", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(photos, "memory://out")
        monkeypatch.undo()
        assert {"manifest.json", "plan.json"} < memory().keys()
        if how == "merge":
            merge_parts("memory://out")
        else:
            convert(photos, "memory://out", resume=True)
        assert memory() == local

    @pytest.mark.parametrize("extras", [{"formats": ("wds", "ffcv")}, {"resamplings": (Resampling(sampling="class-balanced"),)}], ids=str)
    def test_what_is_made_from_local_tars_is_refused(self, photos: Path, memory: Look, extras: dict[str, object]) -> None:
        with pytest.raises(ShardError, match=r"made from local shards, not at memory://out: use a local --out"):
            convert(photos, "memory://out", **extras)
        assert memory() == {}


def test_a_file_url_is_a_local_folder(photos: Path, local: dict[str, str], tmp_path: Path) -> None:
    convert(photos, f"file://{tmp_path}/out", processes=2, resamplings=())
    assert digests(tmp_path / "out") == local
    assert Site(f"local://{tmp_path}/other").folder == tmp_path / "other.partial"


@pytest.mark.parametrize("out", ["s3:/bucket/folder", "s3://", "file://relative", "nonsense://x"])
def test_a_url_that_cannot_be_one_is_a_sentence(photos: Path, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ShardError, ConfigError, ValueError), match=r".+") as raised:
        convert(opened(photos), out)
    assert type(raised.value).__module__ == "pipelines.types"
    assert list(tmp_path.iterdir()) == []
