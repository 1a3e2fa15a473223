"""Shards made by a Ray cluster, whose processes are others than ours, are those of this machine; failures are the same sentences."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.conversion import Resampling, plan
from pipelines.datasets import DatasetOptions, open_dataset
from pipelines.types import BackendError, DatasetError, ShardError
from tests.object_store import free_port
from tests.pipelines.conversion.sources import (
    COUNTS,
    Progress,
    convert,
    digests,
    jpeg,
    opened,
    photo_folder,
    slow,
    source_file,
)
from tests.pipelines.datasets.published import write_files_tar, write_list
from tests.tools.conversions import small_disk

pytest.importorskip("ray", reason="needs Ray: pip install ray")

ROOT = Path(__file__).resolve().parents[3]
STREAMS = (Resampling(sampling="class-balanced", materialised=True),)
TRAIN = sum(COUNTS["train"].values())
START_S = 40


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of this machine, as `ray start` makes it; its address."""
    port = free_port()
    ray = Path(sys.executable).with_name("ray")
    # A short path: sockets lie there, whose names may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, str(ray), "start", "--head", "--block", f"--port={port}", "--num-cpus=2", f"--temp-dir={folder}"]
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline_s = time.monotonic() + START_S
            while "--block" not in (Path(folder) / "log").read_text(errors="replace"):
                assert process.poll() is None, (Path(folder) / "log").read_text(errors="replace")
                assert time.monotonic() < deadline_s, "Ray did not start"
                time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            # All that it started, and nothing else: `ray stop` would end every cluster of this machine.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def address(cluster: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    return cluster


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.mark.usefixtures("address")
def test_the_files_of_this_machine(photos: Path, tmp_path: Path) -> None:
    progress = Progress()
    report = convert(photos, tmp_path / "ray", progress, executor="ray", resamplings=STREAMS)
    progress.assert_sound()
    convert(photos, tmp_path / "local", resamplings=STREAMS)
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")
    assert report is not None
    assert report.class_counts["train"].tolist() == list(COUNTS["train"].values())


@pytest.mark.slow  # the cluster's shards are compared with local ones in the fast suite too
@pytest.mark.usefixtures("address")
def test_a_compressed_archive(tmp_path: Path) -> None:
    entries = [(f"train_val2018/g/{number % 3}/{number}.jpg", number % 3) for number in range(20)]
    write_list(tmp_path / "iNaturalist18_train.txt", entries[:15])
    write_list(tmp_path / "iNaturalist18_val.txt", entries[15:])
    archive = write_files_tar(tmp_path / "images.tar.gz", {name: jpeg(number) for number, (name, _) in enumerate(entries)}, "w:gz")
    dataset = open_dataset("inat18", DatasetOptions(source=archive, lists=tmp_path))
    convert(dataset, tmp_path / "ray", executor="ray")
    convert(dataset, tmp_path / "local")
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")
    with pytest.raises(ShardError, match=r"taken apart on this machine, where a cluster does not see it while --out is s3://"):
        convert(dataset, "s3://shards/out", executor="ray")


@pytest.mark.usefixtures("address")
def test_an_image_that_does_not_decode_is_the_same_sentence(tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos")
    broken = source_file(photos, TRAIN - 1)
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    sentences = set()
    for executor in ("ray", "local"):
        with pytest.raises(DatasetError) as raised:
            convert(photos, tmp_path / executor, executor=executor)
        sentences.add(str(raised.value))
    assert len(sentences) == 1
    broken.write_bytes(whole)
    for executor in ("ray", "local"):
        convert(photos, tmp_path / executor, executor=executor, resume=True)
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.usefixtures("address")
def test_a_full_disk_is_the_same_sentence(photos: Path, tmp_path: Path) -> None:
    sentences = set()
    for executor in ("ray", "local"):
        with small_disk(tmp_path / "disk", "400k") as disk:

            def fill(stage: str, done: int, filler: Path = disk / "filler") -> None:
                if done >= 14:  # two shards
                    with suppress(OSError):
                        filler.write_bytes(bytes(1 << 20))

            with pytest.raises(ShardError) as raised:
                convert(slow(opened(photos), 0.005), disk / "out", Progress(fill), executor=executor)
            sentences.add(str(raised.value))
            (disk / "filler").unlink()
            convert(photos, disk / "out", executor=executor, resume=True)
            assert len(list((disk / "out").glob("train-*.tar"))) > 5
    assert len(sentences) == 1
    assert "No space left on device; nothing was left under that name, and what is finished waits at" in sentences.pop()


@pytest.mark.slow
@pytest.mark.usefixtures("address")
def test_interrupted_nobody_goes_on_writing(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_PROBED", 4)

    def interrupt(stage: str, done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(slow(opened(photos), 0.05), tmp_path / "ray", Progress(interrupt), executor="ray")
    assert len(list(tmp_path.glob("ray.partial/units/*"))) < 6  # the tasks that had not begun never did
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    time.sleep(0.5)  # a unit takes as long
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == left
    convert(photos, tmp_path / "ray", executor="ray", resume=True)
    convert(photos, tmp_path / "local")
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


@pytest.mark.slow
def test_a_connection_of_the_caller_stays_the_callers(photos: Path, tmp_path: Path, address: str) -> None:
    import ray

    ray.init(address=address, log_to_driver=False, configure_logging=False)
    try:
        convert(photos, tmp_path / "out", executor="ray")
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.slow
def test_a_worker_without_this_project_is_a_sentence(photos: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.chdir(tmp_path)  # Ray shows workers where the driver stands
    (tmp_path / "elsewhere" / "pipelines").mkdir(parents=True)
    (tmp_path / "elsewhere" / "pipelines" / "__init__.py").write_text("raise ModuleNotFoundError('No module named pipelines')")
    environment = {"env_vars": {"PYTHONPATH": str(tmp_path / "elsewhere")}}
    ray.init(address=address, log_to_driver=False, configure_logging=False, runtime_env=environment)
    try:
        with pytest.raises(BackendError, match=r"a Ray worker cannot take its task \(.*No module named pipelines\): install this project"):
            convert(photos, tmp_path / "out", executor="ray")
    finally:
        ray.shutdown()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_no_cluster_is_a_sentence_and_soon(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    started_s = time.monotonic()
    with pytest.raises(BackendError, match=rf"no Ray cluster at {address} \(.+\): start one .* in RAY_ADDRESS"):
        convert(photos, tmp_path / "out", executor="ray")
    assert time.monotonic() - started_s < 10
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_this_process_is_refused(photos: Path) -> None:
    with pytest.raises(ShardError, match="memory://out exists in this process only, where a cluster cannot write"):
        convert(photos, "memory://out", executor="ray")


@pytest.mark.slow
def test_without_an_address_this_machine_is_the_cluster(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    names = "from pathlib import Path; from tests.pipelines.conversion.sources import convert"
    code = f"{names}; convert(Path({str(photos)!r}), Path({str(tmp_path / 'ray')!r}), executor='ray')"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "HOME": folder, "RAY_TMPDIR": folder}  # a new cluster makes itself a token at home
        command = [sys.executable, "-W", "error", "-c", code]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=100)  # Ray does not survive a fork
    convert(photos, tmp_path / "local")
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")
