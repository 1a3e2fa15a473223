"""The command with an S3 URL as its output: the same bytes, in parts, after a kill, and the keys wrong."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.object_store import S3, running_s3_or_skip
from tests.tools.conversions import FOLDER, digests, last_words, must_convert, photo_folder, refusal, start

WORK = (*FOLDER, "--shard-bytes", "96KiB", "--processes", "2")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    pytest.importorskip("s3fs", reason="S3 needs s3fs")
    pytest.importorskip("moto", reason="the S3-compatible server of the tests is moto")
    yield from running_s3_or_skip("moto")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    photo_folder(folder / "photos", {"ant": 120, "bee": 60}, size=96)
    must_convert(*WORK, "--out", "local", cwd=folder)
    return folder


def objects(s3: S3, prefix: str) -> dict[str, str]:
    """SHA-256 of everything below a folder of the bucket."""
    with closing(s3.client()) as client:
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=s3.bucket, Prefix=f"{prefix}/").get("Contents", [])]
        bodies = {key: client.get_object(Bucket=s3.bucket, Key=key)["Body"].read() for key in keys}
    return {key.removeprefix(f"{prefix}/"): hashlib.sha256(body).hexdigest() for key, body in bodies.items()}


def test_shards_in_a_bucket(s3: S3, work: Path) -> None:
    out = ("--out", f"s3://{s3.bucket}/whole")
    assert f"shards: s3://{s3.bucket}/whole" in must_convert(*WORK, *out, cwd=work, variables=s3.environment)
    assert objects(s3, "whole") == digests(work / "local")
    assert "exists already; add --overwrite" in refusal(*WORK, *out, cwd=work, variables=s3.environment)
    must_convert(*WORK, *out, "--resume", cwd=work, variables=s3.environment)
    must_convert(*WORK, *out, "--overwrite", cwd=work, variables=s3.environment)
    assert objects(s3, "whole") == digests(work / "local")
    assert "made from local shards" in refusal(*WORK, *out, "--resample", "instance", cwd=work, variables=s3.environment)


@pytest.mark.slow
def test_parts_in_a_bucket(s3: S3, work: Path) -> None:
    out = ("--out", f"s3://{s3.bucket}/parts")
    for part in ("2/2", "1/2"):
        must_convert(*WORK, *out, "--part", part, cwd=work, variables=s3.environment)
    must_convert("merge", *out, cwd=work, variables=s3.environment)
    assert objects(s3, "parts") == digests(work / "local")


def test_killed_on_the_way_to_a_bucket_and_resumed(s3: S3, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    for attempt in range(10):  # on a busy machine it may be done before it is killed
        place = f"killed-{attempt}"
        out = ("--out", f"s3://{s3.bucket}/{place}")
        process = start(*WORK, *out, cwd=work)
        deadline_s = time.monotonic() + 60
        while "units/" not in "".join(objects(s3, place)) and process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        last_words(process)
        if "manifest.json" not in objects(s3, place):
            break
    assert "manifest.json" not in objects(s3, place)
    assert "--resume continues it" in refusal(*WORK, *out, cwd=work)
    must_convert(*WORK, *out, "--resume", cwd=work)
    assert objects(s3, place) == digests(work / "local")


@pytest.mark.slow
def test_foreign_objects_are_never_removed(s3: S3, work: Path) -> None:
    with closing(s3.client()) as client:
        client.put_object(Bucket=s3.bucket, Key="holiday/1.jpg", Body=b"mine")
    before = objects(s3, "holiday")
    for option in ((), ("--overwrite",), ("--resume",)):
        sentence = refusal(*WORK, "--out", f"s3://{s3.bucket}/holiday", *option, cwd=work, variables=s3.environment)
        assert "choose another --out" in sentence
    assert objects(s3, "holiday") == before


@pytest.mark.parametrize("fault", ["bucket", "address"])
def test_a_wrong_address_is_one_sentence(s3: S3, work: Path, fault: str) -> None:
    bucket = "no-such-bucket" if fault == "bucket" else s3.bucket
    elsewhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"} if fault == "address" else {}
    sentence = refusal(*WORK, "--out", f"s3://{bucket}/x", cwd=work, variables={**s3.environment, **elsewhere})
    assert f"s3://{bucket}/x" in sentence
