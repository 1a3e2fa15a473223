"""Where finished shards are read from, from any byte on: a folder, a web server, or any store fsspec has a URL for.

Plain HTTP is the standard library's: it follows redirects and proxy settings, and checks certificates. Nothing here tries long; whoever
reads knows how patient to be. Two kinds of failure are told apart: `ShardError`, which another try cannot mend, and `OSError`, which may
pass.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from pipelines.format.index import open_inside
from pipelines.store import LocalStore, RemoteStore, open_store
from pipelines.types import ShardError

ByteArray = NDArray[np.uint8]
_PIECE_BYTES = 1 << 20  # between two looks at whether the reader was ended
_STORE_PIECE_BYTES = 16 << 20  # of object stores, which answer each piece as a request of its own
_ANSWER_S = 10.0  # a server that is silent for longer is asked anew
_OPENING_WAITS_S = (0.3, 1.0)  # between tries of small files
_PASSING_STATUS = {408, 425, 429}  # too slow, too early, too many: of 4xx the ones that pass; so does every 5xx
_REFUSED_STATUS = {401, 403}
_RANGE_NOT_SATISFIABLE = 416


class Ending:
    """Ends reads that other threads are in: at once over HTTP, at the next piece elsewhere."""

    def __init__(self) -> None:
        """Nothing ends yet."""
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def __bool__(self) -> bool:
        """Whether `end` was called."""
        return self._event.is_set()

    def wait(self, wait_s: float) -> bool:
        """Sleeps for `wait_s` seconds or until the end; returns whether it is."""
        return self._event.wait(wait_s)

    def end(self) -> None:
        """Ends every read under way and to come."""
        self._event.set()
        with self._lock:
            for each in list(self._sockets):
                try:
                    socket.socket.shutdown(each, socket.SHUT_RDWR)  # not TLS's own, which would first say goodbye to a silent server
                except OSError:
                    pass

    def watch(self, connection: socket.socket) -> None:
        """Shuts this connection at the end."""
        with self._lock:
            self._sockets.add(connection)
        if self:
            raise OSError("the reader was ended")


class Origin(Protocol):
    """Files by name that are there already; threads may read at once."""

    def url(self, name: str) -> str:
        """The file's path or URL, for messages."""
        ...

    def read_all(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            ShardError: it is not there or cannot be had; the sentence names it.
        """
        ...

    def read(self, name: str, start: int, target: ByteArray, file_bytes: int, ending: Ending) -> Iterator[int]:
        """Fills uint8 `target` with the file's bytes from `start` on; yields how many have come, piece by piece.

        Ends early where the connection did.

        Raises:
            ShardError: the file is absent, refused, or has not `file_bytes` bytes.
            OSError: what may pass.
        """
        ...


def open_origin(location: Path | str) -> Origin:
    """The origin at a path or URL; nothing is asked of a server yet.

    Raises:
        ShardError: a URL that cannot be one.
        BackendError: a protocol that fsspec does not know, or whose package is missing.
    """
    if re.match(r"https?://", str(location), re.IGNORECASE):
        return WebOrigin(str(location))
    store = open_store(location)
    return LocalOrigin(store.folder) if isinstance(store, LocalStore) else StoreOrigin(str(location))


class LocalOrigin:
    """A folder; here nothing passes, so every failure is a `ShardError`."""

    def __init__(self, folder: Path) -> None:
        """`folder` need not exist yet."""
        self.folder = folder

    def url(self, name: str) -> str:
        """The path."""
        return str(self.folder / name)

    def read_all(self, name: str) -> bytes:
        """The content of a small file."""
        try:
            with open_inside(self.folder, name) as file:
                return file.read()
        except OSError as error:
            raise cannot_read(self.url(name), error.strerror or str(error)) from error

    def read(self, name: str, start: int, target: ByteArray, file_bytes: int, ending: Ending) -> Iterator[int]:
        """Fills `target` from byte `start` on."""
        try:
            with open_inside(self.folder, name) as file:
                require_size(self.url(name), os.fstat(file.fileno()).st_size, file_bytes)
                file.seek(start)
                for low in range(0, len(target), _PIECE_BYTES):
                    piece = target[low : low + _PIECE_BYTES]
                    if file.readinto(piece.data) != len(piece):  # type: ignore[attr-defined]
                        raise cannot_read(self.url(name), "it became shorter")
                    yield len(piece)
        except OSError as error:
            raise cannot_read(self.url(name), error.strerror or str(error)) from error


class WebOrigin:
    """A folder of a web server; anything that serves plain files will do, ranges are asked for and not required."""

    def __init__(self, location: str) -> None:
        """`location` is http://… or https://…; no server is asked."""
        self._location = location.rstrip("/")
        self._opening = threading.local()  # whose read this thread opens: redirects make new requests, so it cannot travel with them
        self._opener: urllib.request.OpenerDirector | None = None

    def url(self, name: str) -> str:
        """The file's URL."""
        return f"{self._location}/{quote(name)}"

    def read_all(self, name: str) -> bytes:
        """The content of a small file, asked for up to three times."""
        for wait_s in (*_OPENING_WAITS_S, None):
            try:
                with self._open(name, {}) as response:
                    content: bytes = response.read()
                return content
            except (OSError, http.client.HTTPException) as error:
                if wait_s is None or isinstance(getattr(error, "reason", error), (socket.gaierror, TimeoutError)):
                    raise cannot_read(self.url(name), reason_of(error), "check the address and the network") from error
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    def read(self, name: str, start: int, target: ByteArray, file_bytes: int, ending: Ending) -> Iterator[int]:
        """Fills `target` from byte `start` on, over one connection."""
        try:
            with self._open(name, {"Range": f"bytes={start}-{start + len(target) - 1}"}, ending) as response:
                before = self._skipped(response, self.url(name), start, file_bytes)
                while before > 0:  # a server that knows no ranges starts anew
                    skipped = len(response.read(min(before, _PIECE_BYTES)))
                    before = before - skipped if skipped else -1
                done = 0
                while before == 0 and done < len(target):
                    piece = response.read1(min(_PIECE_BYTES, len(target) - done))  # what has come: of a cut connection nothing is lost
                    if not piece:
                        return
                    target[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
                    done += len(piece)
                    yield len(piece)
        except http.client.HTTPException as error:
            raise OSError(reason_of(error)) from error

    @staticmethod
    def _skipped(response: Any, url: str, start: int, file_bytes: int) -> int:
        """Bytes of the answer before `start`; also looks at what it says of the file's size."""
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            span = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if not span or int(span[1]) != start:
                raise OSError("the server answers with another range than it was asked for")
            if span[2] != "*":
                require_size(url, int(span[2]), file_bytes)
            return 0
        length = response.headers.get("Content-Length", "")
        if length.isdecimal():
            require_size(url, int(length), file_bytes)
        return start

    def _open(self, name: str, headers: dict[str, str], ending: Ending | None = None) -> Any:
        if self._opener is None:
            self._opener = _opener(self._watch)
        # Compressed answers would have other sizes and no ranges.
        request = urllib.request.Request(self.url(name), headers={"Accept-Encoding": "identity", "User-Agent": "bce3s", **headers})
        self._opening.ending = ending
        try:
            return self._opener.open(request, timeout=_ANSWER_S)
        except HTTPError as error:
            error.close()
            if error.code >= 500 or error.code in _PASSING_STATUS:
                raise OSError(reason_of(error)) from error
            if error.code == _RANGE_NOT_SATISFIABLE:
                raise cannot_read(self.url(name), "it is shorter than the manifest says") from error
            if error.code in _REFUSED_STATUS:
                raise cannot_read(self.url(name), reason_of(error), "have the server allow it to this machine") from error
            raise cannot_read(self.url(name), reason_of(error)) from error
        except (ValueError, http.client.InvalidURL) as error:
            raise cannot_read(self.url(name), str(error), "correct the URL") from error
        except OSError as error:
            if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                raise cannot_read(self.url(name), reason_of(error), "install the server's certificate authority on this machine") from error
            raise

    def _watch(self, connection: socket.socket) -> None:
        ending: Ending | None = self._opening.ending
        if ending is not None:
            ending.watch(connection)


def _opener(watch: Callable[[socket.socket], None]) -> urllib.request.OpenerDirector:
    """An opener that shows every connection it makes to `watch`."""

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            watch(self.sock)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            watch(self.sock)

    context = ssl.create_default_context()

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Plain, req)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Secure, req, context=context)

    return urllib.request.build_opener(PlainHandler, SecureHandler)


class StoreOrigin:
    """A folder of S3 or another store of fsspec's, read in ranges."""

    def __init__(self, location: str) -> None:
        """`location` is a URL."""
        self._store = RemoteStore(location)

    def url(self, name: str) -> str:
        """The file's URL."""
        return f"{self._store.location}/{name}"

    def read_all(self, name: str) -> bytes:
        """The content of a small file."""
        try:
            return self._store.read_bytes(name)
        except FileNotFoundError as error:
            raise cannot_read(self.url(name), "it is not there") from error

    def read(self, name: str, start: int, target: ByteArray, file_bytes: int, ending: Ending) -> Iterator[int]:
        """Fills `target` from byte `start` on, a request a piece."""
        for low in range(0, len(target), _STORE_PIECE_BYTES):
            high = min(low + _STORE_PIECE_BYTES, len(target))
            # One byte beyond a file's end is asked for too: a file that has grown is another one.
            beyond = 1 if start + high == file_bytes else 0
            try:
                piece = self._store.read_range(name, start + low, start + high + beyond, cancelled=lambda: bool(ending))
            except FileNotFoundError as error:
                raise cannot_read(self.url(name), "it is not there") from error
            if len(piece) != high - low:
                raise cannot_read(self.url(name), f"it is {'longer' if len(piece) > high - low else 'shorter'} than the manifest says")
            target[low:high] = np.frombuffer(piece, np.uint8)
            yield high - low


def cannot_read(url: str, reason: str, remedy: str = "put the file back there and run the command again") -> ShardError:
    """The sentence of everything that goes wrong here."""
    return ShardError(f"cannot read {url} ({reason.rstrip('.')}): {remedy}")


def require_size(url: str, found_bytes: int, file_bytes: int) -> None:
    """Raises `ShardError` unless the file has the bytes that the manifest says."""
    if found_bytes != file_bytes:
        change = "it is truncated" if found_bytes < file_bytes else "it has grown"
        raise cannot_read(url, f"{found_bytes} bytes, the manifest says {file_bytes}: {change}", "copy the shard there again")


def reason_of(error: BaseException) -> str:
    """Why, in a few words: the status, what the system says, or the kind of error."""
    if isinstance(error, HTTPError):
        return f"HTTP {error.code} {error.reason}"
    inner = getattr(error, "reason", error)
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
