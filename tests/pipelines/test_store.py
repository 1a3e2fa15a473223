"""A store shows a file whole or not at all, to every process, on disk and behind a real S3 server."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipelines.store import LocalStore, RemoteStore, Store, free_bytes, is_remote, open_store
from tests.object_store import S3, SERVERS, running_s3_or_skip, stalling_line, use, user_environment

KINDS = ("path", "file-url", "memory", *SERVERS)
BETWEEN_PROCESSES = tuple(kind for kind in KINDS if kind != "memory")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def moto() -> Iterator[S3]:
    yield from running_s3_or_skip("moto")


@pytest.fixture(scope="module")
def rclone() -> Iterator[S3]:
    yield from running_s3_or_skip("rclone")


@pytest.fixture
def location(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place of each kind, and a scratch folder to look into."""
    server: S3 | None = request.getfixturevalue(request.param) if request.param in SERVERS else None
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    if server:
        use(monkeypatch, server.environment)
        return f"s3://{server.bucket}/{tmp_path.name}/deep"
    places = {"path": f"{tmp_path}/out", "file-url": f"file://{tmp_path}/out", "memory": f"memory://{tmp_path.name}/out"}
    return places[request.param]


@pytest.fixture
def store(location: str) -> Store:
    return open_store(location)


def in_fork(function: Callable[..., None], *arguments: Any) -> Any:
    """Starts `function` in a forked process, as DataLoader and ProcessPoolExecutor do."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def put_half_and_raise(store: Store, name: str) -> None:
    with store.write_file(name) as path:
        path.write_bytes(b"half")
        raise RuntimeError("mid-way")


def put_and_die(store: Store, name: str) -> None:
    with store.write_file(name) as path:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def put_files(store: Store, worker: int) -> None:
    for number in range(3):
        with store.write_file(f"units/{worker}-{number}.tar") as path:
            path.write_bytes(bytes([worker, number]) * 10_000)
    assert store.read_bytes("before") == b"from the parent"


@pytest.mark.parametrize("location", KINDS, indirect=True)
class TestContract:
    def test_what_is_written_is_read_listed_and_measured(self, store: Store, tmp_path: Path) -> None:
        assert store.names() == []
        store.write_bytes("manifest.json", b"{}")
        store.write_bytes("empty", b"")
        with store.write_file("units/train-000000.tar") as path:
            with path.open("wb") as file:
                file.write(b"tar" * 1000)
            assert "units/train-000000.tar" not in store.names()
        assert store.names() == ["empty", "manifest.json", "units/train-000000.tar"]
        assert store.names("units/") == store.names("units/train-") == ["units/train-000000.tar"]
        assert store.names("unit") == ["units/train-000000.tar"]
        assert store.names("units/val") == store.names("other/") == []
        assert store.read_bytes("units/train-000000.tar") == b"tar" * 1000
        assert [store.size(name) for name in ("units/train-000000.tar", "empty", "absent", "units/absent")] == [3000, 0, None, None]
        assert list((tmp_path / "scratch").iterdir()) == []

    def test_absent_files(self, store: Store) -> None:
        for name in ("absent", "units/absent"):
            store.delete(name)
            with pytest.raises(FileNotFoundError):
                store.read_bytes(name)

    def test_a_file_is_replaced_and_deleted(self, store: Store) -> None:
        store.write_bytes("a", b"first and longer")
        store.write_bytes("a", b"second")
        assert store.read_bytes("a") == b"second"
        with store.write_file("a") as path:
            path.write_bytes(b"3")
        assert (store.read_bytes("a"), store.size("a"), store.names()) == (b"3", 1, ["a"])
        store.delete("a")
        assert (store.size("a"), store.names()) == (None, [])

    def test_an_exception_leaves_what_was_there(self, store: Store, tmp_path: Path) -> None:
        store.write_bytes("old", b"old")
        for name in ("old", "new", "units/new"):
            with pytest.raises(RuntimeError, match="mid-way"):
                put_half_and_raise(store, name)
        assert (store.names(), store.read_bytes("old")) == (["old"], b"old")
        assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.name != "old"] == []

    def test_names_that_leave_the_store_are_refused(self, store: Store) -> None:
        for name in ("../a", "/a", "units/..", "a//b", "", "a/b/c", "a.partial"):
            for method in (store.read_bytes, store.size, store.delete, lambda name: store.write_bytes(name, b"")):
                with pytest.raises(AssertionError):
                    method(name)

    def test_a_copy_by_pickle_is_the_same_store(self, store: Store) -> None:
        store.write_bytes("a", b"1")
        copy: Store = pickle.loads(pickle.dumps(store))
        assert (copy.location, copy.in_process, copy.read_bytes("a")) == (store.location, store.in_process, b"1")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 and later on every fork
@pytest.mark.parametrize("location", BETWEEN_PROCESSES, indirect=True)
class TestProcesses:
    def test_forked_processes_upload_at_once_beside_the_parent(self, store: Store) -> None:
        store.write_bytes("before", b"from the parent")
        processes = [in_fork(put_files, store, worker) for worker in (1, 2)]
        put_files(store, 0)  # the parent's own connections stay good
        for process in processes:
            process.join(timeout=20)
        assert [process.exitcode for process in processes] == [0, 0]
        written = [f"units/{worker}-{number}.tar" for worker in range(3) for number in range(3)]
        assert store.names("units/") == written
        assert all(store.read_bytes(name) == bytes([int(name[6]), int(name[8])]) * 10_000 for name in written)

    def test_a_writer_that_is_killed_leaves_no_file(self, store: Store) -> None:
        store.write_bytes("old", b"old")
        for name in ("old", "new"):
            process = in_fork(put_and_die, store, name)
            process.join(timeout=20)
            assert process.exitcode == -signal.SIGKILL
        assert (store.names(), store.read_bytes("old")) == (["old"], b"old")
        store.write_bytes("new", b"again")
        assert store.names() == ["new", "old"]

    def test_what_another_program_wrote_is_listed(self, store: Store) -> None:
        assert store.names("units/") == []
        source = "import pickle, sys; pickle.loads(sys.stdin.buffer.read()).write_bytes('units/a', b'from afar')"
        subprocess.run([sys.executable, "-c", source], input=pickle.dumps(store), cwd=ROOT, check=True, timeout=20)
        assert (store.names("units/"), store.read_bytes("units/a"), store.size("units/a")) == (["units/a"], b"from afar", 9)


class TestLocal:
    def test_which_locations_are_folders(self, tmp_path: Path) -> None:
        for location in (tmp_path, str(tmp_path), f"file://{tmp_path}", f"local://{tmp_path}"):
            opened = open_store(location)
            assert isinstance(opened, LocalStore)
            assert (opened.location, opened.in_process, is_remote(location)) == (str(tmp_path), False, False)
        assert is_remote("s3://bucket/prefix")
        assert open_store("memory://a").in_process

    def test_a_write_the_disk_refuses_leaves_nothing(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path / "out")
        store.write_bytes("old", b"old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            for name in ("old", "new"):
                with pytest.raises(OSError, match="too large"):
                    store.write_bytes(name, bytes(5000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
        assert store.read_bytes("old") == b"old"

    def test_the_leftover_of_a_killed_writer_goes_with_the_file(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        process = in_fork(put_and_die, store, "a")
        process.join(timeout=20)
        assert [path.name for path in tmp_path.iterdir()] == ["a.partial"]
        store.delete("a")
        assert list(tmp_path.iterdir()) == []

    def test_free_bytes_of_a_folder_that_is_not_there_yet(self, tmp_path: Path) -> None:
        free = free_bytes(tmp_path / "a" / "b")
        assert free is not None
        assert free > 0
        assert free_bytes("memory://a") is None


class TestBigFiles:
    def test_a_file_of_many_parts_arrives_whole(self, moto: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        use(monkeypatch, moto.environment)
        store = open_store(f"s3://{moto.bucket}/big")
        content = os.urandom(1 << 20) * 41  # two parts of 16 MiB and a shorter one
        with store.write_file("a.tar") as path:
            path.write_bytes(content)
        assert store.size("a.tar") == len(content)
        assert store.read_bytes("a.tar") == content
        with closing(moto.client()) as client:
            assert client.head_object(Bucket=moto.bucket, Key="big/a.tar")["ETag"].endswith('-3"')

    @pytest.mark.parametrize("name", SERVERS)
    def test_a_writer_killed_amid_an_upload_leaves_no_file(
        self, name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server: S3 = request.getfixturevalue(name)
        use(monkeypatch, server.environment)
        store = open_store(f"s3://{server.bucket}/killed")
        store.write_bytes("a.tar", b"what was there")
        source = "import sys; from pipelines.store import *\n"
        source += "with open_store(sys.argv[1]).write_file('a.tar') as path: path.write_bytes(bytes(40 << 20))"
        with stalling_line(server.endpoint_url, after_bytes=20 << 20) as (url, stalled):
            environment = {**os.environ, **user_environment(url)}
            writer = subprocess.Popen([sys.executable, "-c", source, store.location], cwd=ROOT, env=environment)
            try:
                assert stalled.wait(timeout=20)
            finally:
                writer.kill()
                writer.wait()
        assert (store.names(), store.read_bytes("a.tar")) == (["a.tar"], b"what was there")
        if name == "moto":  # it was amid one: the server still holds its parts
            with closing(server.client()) as client:
                uploads = client.list_multipart_uploads(Bucket=server.bucket)["Uploads"]
                assert [upload["Key"] for upload in uploads] == ["killed/a.tar"]


def test_a_store_that_is_used_and_dropped_closes_its_connections(moto: S3) -> None:
    source = "import sys, gc; from pipelines.store import *\nstore = open_store(sys.argv[1]); store.names(); del store; gc.collect()"
    environment = {**os.environ, **moto.environment}
    command = [sys.executable, "-W", "error", "-c", source, f"s3://{moto.bucket}/a"]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_remote_store_says_where_it_is() -> None:
    assert RemoteStore("memory://a/b/").location == "memory://a/b"
