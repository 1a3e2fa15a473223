"""Brings whole shards into memory ahead of their use, through cut connections and servers that are gone for a while."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import weakref
from collections import deque
from typing import Any

import numpy as np

from pipelines.format import ShardSplit
from pipelines.format.origin import ByteArray, Ending, Origin, cannot_read, reason_of
from pipelines.loaders.block_order import ShardUse
from pipelines.types import ConfigError, ShardError

_LOG = logging.getLogger(__name__)
_CONNECTIONS = 4  # shards on their way at once: one connection seldom fills a line to an object store
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 2.0
_JOIN_S = 2.0


class LostShardError(ShardError):
    """A shard that cannot be had, by its position in the manifest's list."""

    def __init__(self, message: str, shard: int) -> None:
        """Keeps the shard for whoever goes on without it."""
        super().__init__(message)
        self.shard = shard


class _EndedError(Exception):
    """The reader was ended from outside; nobody waits for what it reads."""


class PatientReader:
    """Reads ranges of an origin's files; where a connection is cut it goes on from there.

    Args:
        origin: where the files lie.
        patience_s: seconds without a byte, from the first failure on, until a file counts as lost.
        ending: ends reads from another thread.
    """

    def __init__(self, origin: Origin, patience_s: float, ending: Ending) -> None:
        """Nothing is read yet."""
        self._origin, self._patience_s, self.ending = origin, patience_s, ending
        self._outage_logged = False

    def url(self, name: str) -> str:
        """The file's path or URL, for messages."""
        return self._origin.url(name)

    def read(self, name: str, start: int, target: ByteArray, file_bytes: int, digest: Any = None) -> None:
        """Fills uint8 `target` with bytes of `name` from `start` on, and feeds them to `digest` as they come.

        Raises:
            ShardError: the file is absent or another one, or its server stayed away for `patience_s`.
        """
        done, failing_since, wait_s = 0, 0.0, _FIRST_WAIT_S
        while done < len(target):
            reason, begun = "the connection was cut", done
            try:
                for num_bytes in self._origin.read(name, start + done, target[done:], file_bytes, self.ending):
                    if digest is not None:
                        digest.update(target[done : done + num_bytes])
                    done += num_bytes
                    self._outage_logged = False
                    if self.ending:
                        raise _EndedError
            except OSError as error:
                reason = reason_of(error)
            if self.ending:
                raise _EndedError
            if done > begun:
                failing_since, wait_s = 0.0, _FIRST_WAIT_S
                continue
            now_s = time.monotonic()
            failing_since = failing_since or now_s
            left_s = failing_since + self._patience_s - now_s
            if left_s <= 0:
                advice = "see to the server, or raise data.stream.patience_s, then run the command again"
                raise cannot_read(self._origin.url(name), f"{reason}; waited {self._patience_s:g} s", advice)
            self._log_outage(name, reason)
            self.ending.wait(min(wait_s, left_s))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _log_outage(self, name: str, reason: str) -> None:
        if not self._outage_logged:  # a line an outage, not a line a try
            self._outage_logged = True
            _LOG.warning("%s does not answer (%s): trying again for %g s", self._origin.url(name), reason, self._patience_s)


class ShardFetcher:
    """Downloads the shards of `uses` in their order with a few threads, as far ahead as `buffer_bytes` allows.

    Memory is counted from the moment a shard is asked for until the last view of it is gone, wherever it went. The bound gives way in
    one case: a batch spans more shards than fit; what the caller waits for is then fetched all the same, and a line logged.

    Attributes:
        held_bytes, peak_bytes: memory of shards, now and at most so far.
    """

    def __init__(self, reader: PatientReader, split: ShardSplit, uses: list[ShardUse], buffer_bytes: int) -> None:
        """Starts the threads."""
        self._reader, self._buffer_bytes, self._uses = reader, buffer_bytes, uses
        self._shards = split.entry["shards"]
        self._changed = threading.Condition()
        self._pending = deque(range(len(uses)))
        self._open: dict[int, deque[int]] = {}  # shard -> its uses that lie ahead
        for number, use in enumerate(uses):
            self._open.setdefault(use.shard, deque()).append(number)
        self._fetched: dict[int, ByteArray | Exception] = {}
        self._awaited = -1  # the use that the caller waits for
        self._overdrawn = False
        self.held_bytes = self.peak_bytes = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"shard-fetcher-{number}", daemon=True)
            for number in range(min(_CONNECTIONS, len(uses)))
        ]
        for thread in self._threads:
            thread.start()

    def get(self, shard: int, step: int) -> ByteArray | None:
        """The bytes of a shard for `step`, uint8 [shard_bytes], waited for; None for one that is not meant to be here by then.

        Raises:
            LostShardError: it cannot be had; the sentence names it.
        """
        with self._changed:
            number = self._open[shard][0] if shard in self._open else None
            if number is None or (self._uses[number].first_step > step and number in self._pending):
                return None
            self._awaited = number
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._awaited in self._fetched)
            found = self._fetched[self._awaited]
            self._awaited = -1
        if isinstance(found, Exception):
            raise found
        return found

    def release_before(self, step: int) -> None:
        """Lets go of shards that no step from `step` on draws from; their memory is free once nobody looks at their images."""
        with self._changed:
            for shard in [shard for shard, numbers in self._open.items() if self._uses[numbers[0]].last_step < step]:
                numbers = self._open[shard]
                while numbers and self._uses[numbers[0]].last_step < step:
                    self._fetched.pop(numbers.popleft(), None)
                if not numbers:
                    del self._open[shard]

    def close(self) -> None:
        """Ends the threads, also those that wait for a server, and lets go of every shard."""
        self._reader.ending.end()
        with self._changed:
            self._pending.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_JOIN_S)
        with self._changed:
            self._fetched.clear()
            self._open.clear()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._pending or self._has_room() or bool(self._reader.ending))
                if not self._pending or self._reader.ending:
                    return
                number = self._pending.popleft()
                shard = self._uses[number].shard
                self.held_bytes += self._shards[shard]["shard_bytes"]
                self.peak_bytes = max(self.peak_bytes, self.held_bytes)
            try:
                found: ByteArray | Exception = self._fetch(shard)
            except _EndedError:
                return
            except ShardError as error:
                found = LostShardError(str(error), shard)
            except Exception as error:  # no memory, say: whoever waits for the shard is told
                found = error
            with self._changed:
                if number in self._open.get(shard, ()):
                    self._fetched[number] = found
                del found
                self._changed.notify_all()

    def _has_room(self) -> bool:
        number = self._pending[0]
        if self.held_bytes + self._shards[self._uses[number].shard]["shard_bytes"] <= self._buffer_bytes:
            return True
        if number > self._awaited:
            return False
        if not self._overdrawn:
            self._overdrawn = True
            _LOG.warning("the batches in flight span more shards than data.stream.buffer_bytes=%d holds: raise it", self._buffer_bytes)
        return True

    def _fetch(self, shard: int) -> ByteArray:
        entry, digest = self._shards[shard], hashlib.sha256()
        buffer = self._counted(entry["shard_bytes"])
        self._reader.read(entry["file"], 0, buffer, len(buffer), digest)
        if digest.hexdigest() != entry["sha256"]:
            raise cannot_read(self._reader.url(entry["file"]), "its SHA-256 is not the manifest's", "copy the shard there again")
        return buffer

    def _counted(self, num_bytes: int) -> ByteArray:
        """Memory that is counted already, and until the last view of it is gone."""
        try:
            buffer = np.empty(num_bytes, np.uint8)
        except MemoryError:
            self._freed(num_bytes)
            raise ConfigError(f"there is no memory for a shard of {num_bytes} bytes: lower data.stream.buffer_bytes") from None
        weakref.finalize(buffer, self._freed, num_bytes).atexit = False
        return buffer

    def _freed(self, num_bytes: int) -> None:
        with self._changed:
            self.held_bytes -= num_bytes
            self._changed.notify_all()
