"""What goes wrong with a store is tried again where that may help, and otherwise said in one sentence, soon."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations as known

from pipelines import store as store_module
from pipelines.store import open_store
from pipelines.types import BackendError, ShardError, UserError
from tests.object_store import S3, free_port, running_s3, running_s3_or_skip, use, user_environment


@pytest.fixture(scope="module")
def moto() -> Iterator[S3]:
    yield from running_s3_or_skip("moto")


@pytest.fixture(scope="module")
def rclone() -> Iterator[S3]:
    yield from running_s3_or_skip("rclone")


class ShakyFileSystem(MemoryFileSystem):
    """A store that drops the line or the end of a file as often as told."""

    protocol = "shaky"
    store: dict[str, Any] = {}  # noqa: RUF012 - MemoryFileSystem's own way to share the files of all instances
    pseudo_dirs = [""]  # noqa: RUF012
    failures: list[BaseException | int] = []  # noqa: RUF012 - an exception to raise amid the file, or how many bytes to lose

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        failure = self.failures.pop() if self.failures else 0
        if isinstance(failure, BaseException):
            super().pipe_file(path, value[:2], **options)
            raise failure
        super().pipe_file(path, value[: len(value) - failure], **options)


class TestBadLines:
    @pytest.fixture(autouse=True)
    def shaky(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fsspec.register_implementation("shaky", ShakyFileSystem, clobber=True)
        monkeypatch.setattr(store_module, "_WAITS_S", (0.0, 0.0))
        monkeypatch.setattr(ShakyFileSystem, "store", {})

    def test_a_failure_that_passes_is_tried_again(self) -> None:
        ShakyFileSystem.failures = [ConnectionResetError("reset"), 3]
        store = open_store("shaky://a")
        store.write_bytes("b", b"content")
        assert (store.read_bytes("b"), store.names(), ShakyFileSystem.failures) == (b"content", ["b"], [])

    def test_one_that_stays_is_a_sentence(self) -> None:
        ShakyFileSystem.failures = [ConnectionResetError("reset by peer")] * 3
        store = open_store("shaky://a")
        with pytest.raises(ShardError, match=r"cannot write shaky://a/b \(reset by peer\): check the network"):
            store.write_bytes("b", b"content")
        assert (ShakyFileSystem.failures, store.names(), store.size("b")) == ([], [], None)

    def test_a_refusal_is_not_repeated(self) -> None:
        ShakyFileSystem.failures = [PermissionError("no"), PermissionError("read only")]
        with pytest.raises(ShardError, match=r"\(read only\): check the credentials"):
            open_store("shaky://a").write_bytes("b", b"content")
        assert len(ShakyFileSystem.failures) == 1

    @pytest.mark.parametrize("object_store", [False, True])
    def test_a_file_that_arrives_in_part_is_removed(self, object_store: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if object_store:  # puts straight to the final name
            monkeypatch.setattr(store_module, "_OBJECT_STORES", ("shaky",))
        ShakyFileSystem.failures = [1, 2, 3]
        store = open_store("shaky://a")
        with pytest.raises(ShardError, match=r"cannot write shaky://a/b \(6 of 7 bytes arrived\)"):
            store.write_bytes("b", b"content")
        assert store.names() == []
        assert ShakyFileSystem.store == {}


class TestSentences:
    @pytest.mark.parametrize(
        ("location", "kind", "sentence"),
        [
            ("file://relative/folder", ShardError, "file:///absolute/folder"),
            ("s3://", ShardError, "names no bucket"),
            ("s3:///folder", ShardError, "names no bucket"),
            (Path("s3://bucket/folder"), ShardError, "write s3://"),
            ("simplecache::s3://bucket", ShardError, "chain"),
            ("nosuch://a/b", BackendError, "no protocol 'nosuch'"),
            ("ossmissing://a", BackendError, "pip install no_such_package"),
            ("sftpmissing://a", BackendError, "paramiko"),
        ],
    )
    def test_a_location_that_cannot_work(self, location: str | Path, kind: type[UserError], sentence: str) -> None:
        known["ossmissing"] = {"class": "no_such_package.core.FileSystem", "err": "install no_such_package to use it"}
        known["sftpmissing"] = {"class": "fsspec.no_such_module.FileSystem", "err": "it needs paramiko"}
        try:
            with pytest.raises(kind, match=sentence):
                open_store(location)
        finally:
            del known["ossmissing"], known["sftpmissing"]

    @pytest.mark.parametrize(
        ("url", "changes", "sentence"),
        [
            ("s3://nosuchbucket/a", {}, "there is no bucket for s3://nosuchbucket/a: create"),
            ("s3://not*a*bucket/a", {}, "correct the URL"),
            ("s3://shards/a", {"AWS_ACCESS_KEY_ID": "stranger"}, "check the credentials"),
            ("s3://shards/a", {"AWS_SECRET_ACCESS_KEY": "guess"}, "check the credentials"),
            ("s3://shards/a", {"AWS_ENDPOINT_URL": "no-url"}, "Invalid endpoint"),
            ("s3://shards/a", {"AWS_ENDPOINT_URL": "http://nosuchhost.invalid"}, "check the network"),
            ("s3://shards/a", {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}, "check the network"),
        ],
    )
    def test_a_wrong_setting_is_reported_in_seconds(
        self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, url: str, changes: dict[str, str], sentence: str
    ) -> None:
        keys = "credentials" in sentence  # only rclone minds them
        server: S3 = request.getfixturevalue("rclone" if keys else "moto")
        use(monkeypatch, {**server.environment, **changes})
        started_s = time.monotonic()
        store = open_store(url)
        with pytest.raises(ShardError, match=sentence) as caught:
            store.write_bytes("b", b"content")
        assert time.monotonic() - started_s < 15
        assert url in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500

    def test_missing_credentials(self, moto: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        use(monkeypatch, moto.environment)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(ShardError, match=r"Unable to locate credentials.*AWS_ACCESS_KEY_ID"):
            open_store(f"s3://{moto.bucket}/a").names()

    def test_a_key_that_may_read_but_not_write(self, monkeypatch: pytest.MonkeyPatch) -> None:
        policy = '{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": ["s3:List*", "s3:Get*"], "Resource": "*"}}'
        with running_s3("moto", unchecked_requests=4) as server, closing(server.client("iam")) as iam:
            iam.create_user(UserName="reader")
            iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)
            key = iam.create_access_key(UserName="reader")["AccessKey"]
            use(monkeypatch, user_environment(server.endpoint_url, key["AccessKeyId"], key["SecretAccessKey"]))
            store = open_store(f"s3://{server.bucket}/a")
            assert store.names() == []
            with pytest.raises(ShardError, match=r"cannot write s3://shards/a/b \(Access Denied\): check the credentials"):
                store.write_bytes("b", b"content")
            use(monkeypatch, user_environment(server.endpoint_url, "stranger", "guess"))
            with pytest.raises(ShardError, match=r"cannot open s3://shards/a \(.*\): check the credentials"):
                open_store(f"s3://{server.bucket}/a").write_bytes("b", b"content")

    def test_a_server_that_never_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store_module, "_FIRST_ANSWER_S", 1.0)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            use(monkeypatch, user_environment(f"http://127.0.0.1:{listener.getsockname()[1]}"))
            started_s = time.monotonic()
            with pytest.raises(ShardError, match="check the network and the address"):
                open_store("s3://shards/a").write_bytes("b", b"content")
            assert time.monotonic() - started_s < 10

    @pytest.mark.slow  # three tries, each with the retries of the S3 package
    def test_a_server_that_goes_away_later(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store_module, "_WAITS_S", (0.0, 0.0))
        with running_s3("moto") as server:
            use(monkeypatch, server.environment)
            store = open_store(f"s3://{server.bucket}/a")
            store.write_bytes("b", b"content")
        with pytest.raises(ShardError, match=r"cannot write s3://shards/a/c .*check the network"):
            store.write_bytes("c", b"content")
