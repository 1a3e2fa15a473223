"""A real nginx on this machine that serves one folder, and a line to it that breaks off."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.object_store import free_port

_CONFIG = """
daemon off;
worker_processes 1;
pid {home}/pid;
error_log {home}/error.log;
{user}
events {{ worker_connections 64; }}
http {{
    log_format requests '$request_uri|$status|$body_bytes_sent|$http_range';
    access_log {home}/access.log requests;
    client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        {extra}
    }}
}}
"""


class Request(NamedTuple):
    """What nginx answered: the path, the status, bytes of the body that it sent, and the range asked for ("512-1023", or "")."""

    path: str
    status: int
    body_bytes: int
    range: str

    @property
    def start(self) -> int:
        """The first byte asked for."""
        return int(self.range.partition("-")[0] or 0)


@dataclass
class Nginx:
    """An nginx that can be killed and started again on the same port."""

    url: str
    home: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        """Starts it and waits until it answers."""
        command = [nginx_path() or "nginx", "-c", str(self.home / "nginx.conf"), "-e", str(self.home / "error.log"), "-p", str(self.home)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise RuntimeError(f"nginx did not start: {(self.home / 'error.log').read_text()[-2000:]}")

    def stop(self) -> None:
        """Ends it in the middle of whatever it sends."""
        if self.process is not None:
            self.process.terminate()  # "fast shutdown": connections are closed at once
            self.process.wait(timeout=10)
            self.process = None

    def requests(self) -> list[Request]:
        """Everything answered so far, in order; a request is logged when its answer ends."""
        log = self.home / "access.log"
        found = [line.split("|") for line in log.read_text().splitlines()] if log.exists() else []
        return [Request(path, int(status), int(sent), wanted.removeprefix("bytes=").strip("-")) for path, status, sent, wanted in found]


def nginx_path() -> str | None:
    """An nginx on the PATH or where Debian puts it; `apt-get install nginx-light` brings one."""
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))


@contextmanager
def running_nginx(root: Path, extra: str = "") -> Iterator[Nginx]:
    """Serves `root` on a free port; `extra` goes into nginx's server block. Skips where there is no nginx."""
    if nginx_path() is None:
        pytest.skip("no nginx: apt-get install nginx-light")
    with tempfile.TemporaryDirectory(prefix="nginx-") as folder:
        port, home = free_port(), Path(folder)
        user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""  # root's workers would be nobody, who cannot read tests' folders
        (home / "nginx.conf").write_text(_CONFIG.format(home=home, user=user, port=port, root=root, extra=extra))
        nginx = Nginx(f"http://127.0.0.1:{port}", home, port)
        nginx.start()
        try:
            yield nginx
        finally:
            nginx.stop()


@contextmanager
def breaking_line(port: int, after_bytes: int, times: int | None = None) -> Iterator[tuple[str, list[int]]]:
    """A URL that leads to the server at `port` and breaks connections off, all or `times`, once they have answered `after_bytes`.

    The list receives the first byte that each broken connection had been asked for.
    """
    breaks: list[int] = []
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def carry(near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            try:
                request = near.recv(1 << 16)
                far.sendall(request)
                left = after_bytes if times is None or len(breaks) < times else 1 << 40
                while content := far.recv(min(1 << 14, left)):
                    near.sendall(content)
                    left -= len(content)
                    if not left:
                        breaks.append(int((re.search(rb"bytes=(\d+)", request) or [b"0", b"0"])[1]))
                        return
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                near = listener.accept()[0]
            except OSError:
                return
            threads.append(threading.Thread(target=carry, args=(near,), daemon=True))
            threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", breaks
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in [acceptor, *threads]:
            thread.join(timeout=5)
