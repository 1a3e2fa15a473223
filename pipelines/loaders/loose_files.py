"""Image files read ahead of their use, as they would lie in shards: checked, upright, RGB, in the order in which they were named.

Memory holds three chunks at most, whatever the number of files: the one that is looked at, the next, and the one that is being read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from queue import Full, Queue
from typing import NamedTuple

from pipelines.format.encoding import PixelOptions, PreparedSample, prepare_sample
from pipelines.types import DatasetError, EncodedSample

_CHUNK_FILES, _CHUNK_BYTES = 1024, 64 << 20
_FILES_IN_FLIGHT = 64
_POLL_S = 0.05


class LooseFile(NamedTuple):
    """A file that could be read; `sample` is what make_shards.py would store of it."""

    path: str
    sample: PreparedSample


class Chunk(NamedTuple):
    """Some files in their order, and a sentence for each one among them that is no readable image."""

    files: list[LooseFile]
    complaints: list[str]


def read_file(path: str, options: PixelOptions) -> LooseFile:
    """One file as it would lie in a shard.

    Raises:
        DatasetError: it cannot be opened, or is no readable image; the sentence names it.
    """
    shown = path.encode("utf-8", "backslashreplace").decode()
    try:
        with open(path, "rb", buffering=0) as file:
            encoded = file.read()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte in it
        raise DatasetError(f"cannot read {shown} ({getattr(error, 'strerror', None) or error})") from error
    # The extension is not believed: what the bytes are is seen from the bytes.
    return LooseFile(path, prepare_sample(EncodedSample(encoded=encoded, extension="jpg", label=0, source=shown), options))


def read_chunks(paths: Iterable[str], options: PixelOptions, batch_size: int, num_threads: int) -> Generator[Chunk, None, None]:
    """Chunks of files, read by a thread of their own while the one before is worked on.

    Every chunk but the last holds a multiple of `batch_size` readable files, so that batches are those of one long split. The first is
    one batch, so that something is seen soon; the others grow up to 1,024 files or 64 MiB.

    Args:
        paths: taken one after another, from the reading thread.
        options: `min_side` and `max_side` are not used; `validate` off believes the headers of plain JPEGs.
        batch_size: files of a batch.
        num_threads: that read and check.

    Raises:
        UserError: what `paths` raises.
    """
    handed: Queue[Chunk | BaseException | None] = Queue(maxsize=1)
    ended = threading.Event()

    def produce() -> None:
        try:
            with ThreadPoolExecutor(num_threads, "read") as pool:
                for chunk in _assembled(_in_order(paths, options, pool, ended), batch_size):
                    _put(handed, chunk, ended)
            _put(handed, None, ended)
        except BaseException as error:  # whoever waits for the next chunk is told
            _put(handed, error, ended)

    # A daemon: it may wait for standard input, which nobody can interrupt.
    threading.Thread(target=produce, name="files", daemon=True).start()
    try:
        while (chunk := handed.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk
    finally:
        ended.set()


def _put(queue: Queue[Chunk | BaseException | None], item: Chunk | BaseException | None, ended: threading.Event) -> None:
    while not ended.is_set():
        with suppress(Full):
            queue.put(item, timeout=_POLL_S)
            return


def _in_order(
    paths: Iterable[str], options: PixelOptions, pool: ThreadPoolExecutor, ended: threading.Event
) -> Iterator[LooseFile | DatasetError]:
    """Each file or its error, in the order of `paths`; a few are read at once."""
    remaining = iter(paths)
    in_flight: deque[Future[LooseFile]] = deque(pool.submit(read_file, path, options) for path in islice(remaining, _FILES_IN_FLIGHT))
    while in_flight and not ended.is_set():
        try:
            yield in_flight.popleft().result()
        except DatasetError as error:
            yield error
        in_flight.extend(pool.submit(read_file, path, options) for path in islice(remaining, 1))
    for future in in_flight:
        future.cancel()


def _assembled(found: Iterator[LooseFile | DatasetError], batch_size: int) -> Iterator[Chunk]:
    chunk, num_bytes, wanted = Chunk([], []), 0, batch_size
    for item in found:
        if isinstance(item, DatasetError):
            chunk.complaints.append(str(item))
            continue
        chunk.files.append(item)
        num_bytes += len(item.sample.sample.encoded)
        if len(chunk.files) % batch_size == 0 and (len(chunk.files) >= wanted or num_bytes >= _CHUNK_BYTES):
            yield chunk
            chunk, num_bytes, wanted = Chunk([], []), 0, min(2 * wanted, max(batch_size, _CHUNK_FILES))
    if chunk.files or chunk.complaints:
        yield chunk
