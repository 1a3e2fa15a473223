"""Where finished files go: a local folder, or any store fsspec has a URL for. Each file appears whole or not at all.

`open_store` gives a `LocalStore` for a path or file:// URL and a `RemoteStore` for every other URL (s3://bucket/prefix, gs://…,
memory://…). Both can be pickled and used in forked processes. Credentials and endpoints come from where the store's own package looks
for them; for S3 that is the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, …) and ~/.aws.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from pipelines.durable import replacing, sync_folder, write_atomically
from pipelines.types import BackendError, ShardError, UserError

T = TypeVar("T")
_PARTIAL = ".partial"  # what `replacing` appends while a file is being written; names that end so are never listed
_LOCAL_PROTOCOLS = ("file", "local")
_S3_PROTOCOLS = ("s3", "s3a")
# Object stores show an upload only once it is complete. Everywhere else a file is uploaded under a temporary name and moved.
_OBJECT_STORES = (*_S3_PROTOCOLS, "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci")
_FIRST_ANSWER_S = 15.0
_LOOK_S = 0.2  # between two looks at whether a request was given up
_WAITS_S = (0.5, 2.0)  # before the second and the third try
_PART_BYTES = 16 << 20  # S3; files of two parts and more go as multipart uploads, four parts in memory at a time
_HOPELESS = (PermissionError, FileNotFoundError, FileExistsError, ValueError, TypeError, NotImplementedError, MemoryError)
_DENIED = {"PermissionError", "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
_UNREACHABLE = {"ConnectionError", "TimeoutError", "HTTPClientError", "ClientConnectionError", "gaierror", "FSTimeoutError"}


class Store(Protocol):
    """Files by name, each whole or absent; a name has at most one folder ("units/train-000003.json").

    One writer a name at a time: two that write the same name of a folder at once spoil each other's file.
    """

    @property
    def location(self) -> str:
        """The path or URL, for messages."""
        ...

    @property
    def in_process(self) -> bool:
        """True where other processes do not see what is put."""
        ...

    def write_file(self, name: str) -> AbstractContextManager[Path]:
        """A local path to write to, exactly this one; what it holds when the block ends well is stored as `name`."""
        ...

    def write_bytes(self, name: str, content: bytes) -> None:
        """Stores `content` as `name`, in place of what was there."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """The content of `name`; FileNotFoundError where it is absent."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of `name`, None where it is absent."""
        ...

    def names(self, prefix: str = "") -> list[str]:
        """Sorted names of the files there now, of all folders, that begin with `prefix`."""
        ...

    def delete(self, name: str) -> None:
        """Removes `name`, where it is there."""
        ...


def open_store(location: str | Path) -> Store:
    """The store at a path or URL; nothing is written, and no server is asked yet.

    Raises:
        ShardError: a URL that cannot be one.
        BackendError: a protocol that fsspec does not know, or whose package is missing.
    """
    protocol, rest = _split_url(location)
    if protocol is None:
        return LocalStore(Path(location))
    if protocol in _LOCAL_PROTOCOLS:
        if not rest.startswith("/"):
            raise ShardError(f"{location} is not an absolute path: write {protocol}:///absolute/folder, or the path without {protocol}://")
        return LocalStore(Path(rest))
    if protocol in _OBJECT_STORES and not rest.partition("/")[0]:
        raise ShardError(f"{location} names no bucket: write {protocol}://BUCKET/FOLDER")
    return RemoteStore(str(location))


def is_remote(location: str | Path) -> bool:
    """Whether `location` is a URL of anything but local files."""
    protocol, _ = _split_url(location)
    return protocol is not None and protocol not in _LOCAL_PROTOCOLS


def free_bytes(location: str | Path) -> int | None:
    """Bytes free on the disk a local location is or would be on; None for a remote one, which does not say."""
    store = open_store(location)
    if not isinstance(store, LocalStore):
        return None
    folder = store.folder.absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


@dataclass(frozen=True)
class LocalStore:
    """A folder, made when the first file is written. Errors of the disk (full, read-only, forbidden) are OSError.

    A writer that is killed leaves NAME.partial behind; `names` does not show it, writing or deleting NAME removes it.
    """

    folder: Path
    in_process = False

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.folder)

    @contextmanager
    def write_file(self, name: str) -> Iterator[Path]:
        """A path beside the final one, fsynced and renamed when the block ends well."""
        # `replacing` syncs through its own handle: the block may open the path again, not put another file in its place.
        with replacing(self._path_to_write(name)) as file:
            yield Path(file.name)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Stores `content` as `name`, fsynced, in place of what was there."""
        write_atomically(self._path_to_write(name), content)

    def read_bytes(self, name: str) -> bytes:
        """The content of `name`; FileNotFoundError where it is absent."""
        return (self.folder / _checked(name)).read_bytes()

    def size(self, name: str) -> int | None:
        """Bytes of `name`, None where it is absent."""
        try:
            return (self.folder / _checked(name)).stat().st_size
        except FileNotFoundError:
            return None

    def names(self, prefix: str = "") -> list[str]:
        """Sorted names of the files there now, of all folders, that begin with `prefix`."""
        if not self.folder.exists():
            return []
        paths = (Path(place, file) for place, _, files in os.walk(self.folder, onerror=_raise) for file in files)
        return _visible((path.relative_to(self.folder).as_posix() for path in paths), prefix)

    def delete(self, name: str) -> None:
        """Removes `name` and what a killed writer left of it."""
        path = self.folder / _checked(name)
        path.unlink(missing_ok=True)
        path.with_name(path.name + _PARTIAL).unlink(missing_ok=True)

    def _path_to_write(self, name: str) -> Path:
        path = self.folder / _checked(name)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent.parent)
        return path


class RemoteStore:
    """Files under a URL of fsspec. Uploads are checked by size; what fails for the moment is tried three times.

    The first request of a store, before it is pickled or in whichever process comes first, is not repeated and must be answered within
    15 s where the package allows a limit, so that a wrong address, bucket or key is reported at once.

    Args:
        url: protocol://…, the folder the names are in; the bucket exists, folders need not.

    Raises:
        BackendError: (here) an unknown protocol or a missing package.
        ShardError: (every method) the store cannot be reached, refuses, has no such bucket, or lost a part of a file.
    """

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/") if not url.endswith("://") else url
        self.protocol = _split_url(url)[0]
        self._answered = False
        self._opened: tuple[int, Any, str] | None = None
        self._inherited: list[Any] = []
        _require_package(self.location, self.protocol)

    def __getstate__(self) -> dict[str, Any]:
        # Connections stay in the process that opened them.
        return {**self.__dict__, "_opened": None, "_inherited": []}

    @property
    def in_process(self) -> bool:
        """True for memory://, which other processes do not see."""
        return self.protocol == "memory"

    @contextmanager
    def write_file(self, name: str) -> Iterator[Path]:
        """A path in a temporary folder (TMPDIR), uploaded when the block ends well and removed in any case."""
        with tempfile.TemporaryDirectory(prefix="shards-", ignore_cleanup_errors=True) as scratch:
            path = Path(scratch) / PurePosixPath(_checked(name)).name
            path.touch()
            yield path
            options = {"chunksize": _PART_BYTES, "max_concurrency": 4} if self.protocol in _S3_PROTOCOLS else {}
            self._put(name, path.stat().st_size, lambda fs, target: fs.put_file(str(path), target, **options))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Stores `content` as `name`, in place of what was there."""
        self._put(_checked(name), len(content), lambda fs, target: fs.pipe_file(target, content))

    def read_bytes(self, name: str) -> bytes:
        """The content of `name`; FileNotFoundError where it is absent."""
        return self._try("read", _checked(name), lambda fs, path: bytes(fs.cat_file(path)))

    def read_range(self, name: str, start: int, stop: int, *, cancelled: Callable[[], bool] = lambda: False) -> bytes:
        """Bytes `start` … `stop` − 1 of `name`, fewer where it ends before; tried once, so that the caller decides how patient to be.

        Args:
            cancelled: asked a few times a second; once true, the request is given up.

        Raises:
            FileNotFoundError: it is absent.
            ShardError: what another try cannot mend.
            OSError: what may pass, and a request given up.
        """
        fs, root = self._filesystem()
        path = f"{root}/{_checked(name)}"
        try:
            if not fs.async_impl:
                return bytes(fs.cat_file(path, start=start, end=stop))
            request = asyncio.run_coroutine_threadsafe(fs._cat_file(path, start=start, end=stop), fs.loop)
            while not request.done():
                if cancelled():
                    request.cancel()
                    raise OSError("the request was given up")
                wait([request], timeout=_LOOK_S)
            return bytes(request.result())
        except Exception as error:  # packages raise what they like
            if getattr(error, "errno", None) == errno.EINVAL:  # what s3fs makes of a range that begins beyond the end
                return b""
            if isinstance(error, FileNotFoundError):
                raise
            if isinstance(error, _HOPELESS):
                raise _failure(f"{self.location}/{name}", "read", error) from error
            raise OSError(str(error) or type(error).__name__) from error

    def size(self, name: str) -> int | None:
        """Bytes of `name`, None where it is absent."""
        try:
            return self._try("look up", _checked(name), lambda fs, path: int(fs.info(path)["size"]))
        except FileNotFoundError:
            return None

    def names(self, prefix: str = "") -> list[str]:
        """Sorted names of the files there now, of all folders, that begin with `prefix`."""
        below = prefix.rpartition("/")[0]

        def find(fs: Any, path: str) -> list[str]:
            root = path.removesuffix(f"/{below}") if below else path
            found: list[str] = fs.find(path)
            return [entry.removeprefix(f"{root}/") for entry in found if entry.startswith(f"{root}/")]

        try:
            return _visible(self._try("list", below, find), prefix)
        except FileNotFoundError:
            return []

    def delete(self, name: str) -> None:
        """Removes `name`, where it is there."""
        try:
            self._try("delete", _checked(name), lambda fs, path: fs.rm_file(path))
        except FileNotFoundError:
            pass

    def _put(self, name: str, num_bytes: int, send: Callable[[Any, str], object]) -> None:
        """Uploads by `send(filesystem, path)` and compares the size; a file that arrived in part is removed."""

        def put(fs: Any, path: str) -> None:
            at_once = self.protocol in _OBJECT_STORES
            target = path if at_once else path + _PARTIAL
            if not at_once:
                fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            send(fs, target)
            fs.invalidate_cache()
            arrived = fs.info(target)["size"]
            if arrived != num_bytes:
                fs.rm_file(target)
                raise OSError(f"{arrived} of {num_bytes} bytes arrived")
            if not at_once:
                if fs.exists(path):  # not every store's move replaces
                    fs.rm_file(path)
                fs.mv(target, path)

        try:
            self._try("write", name, put)
        except FileNotFoundError as error:
            raise _failure(f"{self.location}/{name}", "write", error) from error

    def _try(self, verb: str, name: str, operation: Callable[[Any, str], T]) -> T:
        """`operation(filesystem, path of name)`, again after a pause where it failed for a reason that may pass.

        Raises:
            FileNotFoundError: the operation's own.
            ShardError: anything else that went wrong.
        """
        for wait_s in (*_WAITS_S, None):
            try:
                fs, root = self._filesystem()
                fs.invalidate_cache()  # other processes write there too
                return operation(fs, f"{root}/{name}" if name else root)
            except (UserError, FileNotFoundError):
                raise
            except Exception as error:  # packages raise what they like
                if wait_s is None or isinstance(error, _HOPELESS):
                    raise _failure(f"{self.location}/{name}", verb, error) from error
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    def _filesystem(self) -> tuple[Any, str]:
        """This process's filesystem and the root's path in it."""
        if self._opened is not None and self._opened[0] != os.getpid():
            # Its connections and event loop are the parent's. Kept, because freeing it would close them under the parent's feet.
            self._inherited.append(self._opened)
            self._opened = None
        if self._opened is None:
            from fsspec.core import url_to_fs

            try:
                fs, root = url_to_fs(self.location, skip_instance_cache=True, **_options(self.protocol))
                if self.protocol in _S3_PROTOCOLS:
                    fs.retries = 1  # of its own, on top of botocore's
                if not self._answered:
                    self._greet(fs, root)
            except UserError:
                raise
            except Exception as error:
                raise _failure(self.location, "open", error) from error
            self._answered = True
            self._opened = os.getpid(), fs, root.rstrip("/")
        return self._opened[1], self._opened[2]

    def _greet(self, fs: Any, root: str) -> None:
        """Asks for a file that is not there: the cheapest question that shows the address, the keys and the bucket to be right."""
        limit = {"timeout": _FIRST_ANSWER_S} if fs.async_impl else {}
        try:
            fs.find(f"{root}/.nothing", **limit)
        except FileNotFoundError as error:
            if self.protocol in _S3_PROTOCOLS:
                raise ShardError(f"there is no bucket for {self.location}: create the bucket, or correct its name") from error


def _split_url(location: str | Path) -> tuple[str | None, str]:
    """Protocol and the rest of a URL; (None, location) of a path."""
    from fsspec.registry import known_implementations

    text = str(location)
    url = re.fullmatch(r"([A-Za-z][\w+.-]*)://(.*)", text, re.DOTALL)
    if url:
        return url[1], url[2]
    if "::" in text and "://" in text:
        raise ShardError(f"{text} is a chain of stores: give the URL of one, protocol://…")
    # Path("s3://bucket/folder") has lost a slash; a folder called "s3:" is hardly meant.
    typo = re.match(r"([A-Za-z][\w+.-]*):", text)
    if typo and typo[1] in known_implementations:
        raise ShardError(f"{text} is neither a path nor a URL: write {typo[1]}://…, or an absolute path for a folder of that name")
    return None, text


def _require_package(url: str, protocol: str | None) -> None:
    import fsspec
    from fsspec.registry import known_implementations

    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise BackendError(f"{url}: fsspec knows no protocol '{protocol}'; use a folder, s3://… or another of its stores") from error
    except ImportError as error:
        module = known_implementations.get(protocol, {}).get("class", "fsspec").partition(".")[0]
        remedy = "install it" if module == "fsspec" else f"pip install {module}"
        raise BackendError(f"{url} needs a package that is missing ({error}): {remedy} and run the command again") from error


def _options(protocol: str | None) -> dict[str, Any]:
    """Of the filesystem: for S3, patience that ends within a minute or two; what fsspec's configuration says comes first."""
    from fsspec.config import conf

    if protocol not in _S3_PROTOCOLS:
        return {}
    patience = {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 3, "mode": "standard"}}
    return {"config_kwargs": patience | conf.get("s3", {}).get("config_kwargs", {})}


def _failure(url: str, verb: str, error: BaseException) -> ShardError:
    """The sentence for what a filesystem raised."""
    reason = textwrap.shorten(str(error), 240, placeholder=" …").rstrip(".") or type(error).__name__
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & _DENIED:
        remedy = "check the credentials (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE) and what they may do there"
    elif kinds & _UNREACHABLE:
        remedy = "check the network and the address (for S3 AWS_ENDPOINT_URL), then run the command again"
    elif isinstance(error, FileNotFoundError):
        remedy = "create the bucket or the folder above, or correct its name"
    elif kinds & {"ValueError", "ParamValidationError"}:
        remedy = "correct the URL or the setting it speaks of"
    else:
        remedy = "see to that and run the command again"
    return ShardError(f"cannot {verb} {url.rstrip('/')} ({reason}): {remedy}")


def _checked(name: str) -> str:
    parts = name.split("/")
    assert 1 <= len(parts) <= 2, f"{name!r} has more than one folder"
    assert all(part not in ("", ".", "..") for part in parts), f"{name!r} is not a plain name"
    assert not name.endswith(_PARTIAL), f"{name!r} looks like a file half written"
    return name


def _visible(names: Iterator[str] | list[str], prefix: str) -> list[str]:
    return sorted(name for name in names if name.startswith(prefix) and not name.endswith(_PARTIAL))


def _raise(error: OSError) -> None:
    raise error
