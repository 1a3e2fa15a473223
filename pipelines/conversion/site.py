"""Where a conversion works and how its result takes its place.

A local folder is made beside its final name, in `OUT.partial`, and renamed as the last act. Object stores cannot rename, so there
everything is written in place and the manifest comes last: without it, it is not a shard folder yet.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipelines.conversion.plan import PLAN_FILE, ConversionPlan
from pipelines.conversion.spool import SPOOL_FOLDER
from pipelines.conversion.unit import UNIT_FOLDER
from pipelines.durable import publish_folder
from pipelines.format.index import FORMAT_NAME, MANIFEST_FILE
from pipelines.store import Store, is_remote, open_store
from pipelines.types import ShardError

_LOCK_PATIENCE_S = 3.0  # workers of a run that was just killed need a moment to go


class Site:
    """The place of one conversion.

    Attributes:
        store: where files go while it runs.
        folder: the same as a local path; None for a remote store.
    """

    def __init__(self, out: str) -> None:
        """`out` is the final folder, a path or a URL."""
        self._remote = is_remote(out)
        self.out = out
        self._final = None if self._remote else Path(out.removeprefix("file://")).absolute()
        self.folder = None if self._final is None else self._final.with_name(self._final.name + ".partial")
        self.store: Store = open_store(out if self.folder is None else self.folder)

    def finished_manifest(self) -> dict[str, Any] | None:
        """The manifest under the final name, if there is one."""
        return _read_manifest(self.store if self._final is None else open_store(self._final))

    def stored_plan(self) -> ConversionPlan | None:
        """The plan of an unfinished conversion."""
        try:
            return ConversionPlan.from_json(self.store.read_bytes(PLAN_FILE), f"{self.store.location}/{PLAN_FILE}")
        except FileNotFoundError:
            return None

    def prepare(self, *, resume: bool, overwrite: bool) -> bool:
        """Makes room for a conversion; returns False where it is already complete and `resume` asks for no more.

        What a killed run left is worth keeping once it holds a finished unit; before that it is cleared without asking.

        Raises:
            ShardError: something is in the way that the options do not allow to continue or replace; says which option would.
        """
        self._require_replaceable(resume=resume, overwrite=overwrite)
        if resume and not overwrite and self.finished_manifest() is not None and not self._unfinished():
            return False
        if not resume and (overwrite or not self._unfinished()):
            self.clear()
        elif not resume:
            raise ShardError(
                f"an unfinished conversion lies at {self.store.location}: --resume continues it, --overwrite starts over from nothing"
            )
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        return True

    def spool_folder(self, part: str) -> Path:
        """A local folder for what streams in; the same for a resumed run, another for every part."""
        if self.folder is not None:
            return self.folder / (SPOOL_FOLDER + part)
        return Path(tempfile.gettempdir()) / f"bce3s-spool-{sha256(self.out.encode()).hexdigest()[:16]}{part}"

    def publish(self) -> None:
        """Removes what only an unfinished conversion needs and gives the folder its name; the manifest is already there."""
        for name in self.store.names():
            if name.startswith((f"{UNIT_FOLDER}/", SPOOL_FOLDER)) or name == PLAN_FILE:
                self.store.delete(name)
        if self.folder is not None and self._final is not None:
            for path in [self.folder / UNIT_FOLDER, *self.folder.glob(SPOOL_FOLDER + "*")]:
                shutil.rmtree(path, ignore_errors=True)
            publish_folder(self.folder, self._final)

    def complete_partial(self) -> dict[str, Any] | None:
        """The manifest of a conversion that was killed between its last file and its new name."""
        return _read_manifest(self.store) if self.folder is not None else None

    @contextmanager
    def locked(self, part: str) -> Iterator[None]:
        """Keeps a second run (of the same part) away while the block lasts; object stores have no locks."""
        if self._final is None:
            yield
            return
        self._final.parent.mkdir(parents=True, exist_ok=True)
        lock_path = self._final.with_name(f"{self._final.name}{part}.lock")
        with ExitStack() as stack:
            lock = stack.enter_context(lock_path.open("w"))
            deadline = time.monotonic() + _LOCK_PATIENCE_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise ShardError(
                            f"another run is writing {self.out} (it holds {lock_path}); wait for it or choose another --out"
                        ) from None
                    time.sleep(_LOCK_PATIENCE_S / 30)
            try:
                yield
            finally:
                # Other parts may be about to write their first unit into the same folder.
                if not part and not self._unfinished():
                    self.clear()
                lock_path.unlink(missing_ok=True)

    def _unfinished(self) -> bool:
        """True where an earlier run left something that took work."""
        if self.folder is not None:
            return any(any(self.folder.glob(pattern)) for pattern in (f"{UNIT_FOLDER}/*.json", f"{SPOOL_FOLDER}*/*.json", MANIFEST_FILE))
        return bool(self.store.names(f"{UNIT_FOLDER}/")) and self.store.size(MANIFEST_FILE) is None

    def _require_replaceable(self, *, resume: bool, overwrite: bool) -> None:
        """Refuses what stands at `out`; with `overwrite`, anything but shards or an empty folder: it may be somebody's photographs."""
        if self._final is None:
            names = self.store.names()
            known = MANIFEST_FILE in names or PLAN_FILE in names
        elif self._final.exists():
            if not self._final.is_dir():
                raise ShardError(f"{self.out} is not a shard folder, so --overwrite does not remove it; choose another --out")
            names = [path.name for path in self._final.iterdir()]
            known = MANIFEST_FILE in names
        else:
            return
        if names and not known:
            raise ShardError(f"{self.out} is not a shard folder, so --overwrite does not remove it; choose another --out")
        if not overwrite and not resume and (self._final is not None or MANIFEST_FILE in names):
            raise ShardError(f"{self.out} exists already; add --overwrite to replace it or choose another --out")

    def clear(self) -> None:
        """Removes an unfinished conversion; in an object store, which cannot swap folders, also a finished one, its manifest first."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        self.store.delete(MANIFEST_FILE)
        for name in self.store.names():
            self.store.delete(name)


def _read_manifest(store: Store) -> dict[str, Any] | None:
    try:
        manifest = json.loads(store.read_bytes(MANIFEST_FILE))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT_NAME else None
