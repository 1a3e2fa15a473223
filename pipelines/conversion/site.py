"""Where a conversion works and how its result takes its place.

A local folder is made beside its final name, in `OUT.partial`, and renamed as the last act. Object stores cannot rename, so there
everything is written in place and the manifest comes last: without it, it is not a shard folder yet.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from pipelines.conversion.plan import PLAN_FILE, ConversionPlan
from pipelines.conversion.spool import SPOOL_FOLDER
from pipelines.conversion.unit import UNIT_FOLDER
from pipelines.durable import publish_folder
from pipelines.format.index import FORMAT_NAME, MANIFEST_FILE, index_file
from pipelines.format.manifest import manifest_faults
from pipelines.store import LocalStore, Store, open_store
from pipelines.types import ShardError

_LOCK_PATIENCE_S = 3.0  # workers of a run that was just killed need a moment to go
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network disks
# What a conversion writes, killed halfway included; hidden files are the system's.
_OURS = re.compile(rf"(plan|manifest)\.json(\.partial)?|{UNIT_FOLDER}|{SPOOL_FOLDER}.*|(train|val|test)[.-].*|\..*")


class Site:
    """The place of one conversion.

    Attributes:
        store: where files go while it runs.
        folder: the same as a local path; None for a remote store.
    """

    def __init__(self, out: str) -> None:
        """`out` is the final folder, a path or a URL.

        Raises:
            ShardError: it cannot be one.
            BackendError: a protocol that is unknown, or whose package is missing.
        """
        final = open_store(out)
        self.out = out
        self._finished = final
        self._final = Path(os.path.abspath(final.folder)) if isinstance(final, LocalStore) else None
        if self._final is not None and not self._final.name:
            raise ShardError(f"{out} is the root of the disk: choose a folder as --out")
        self.folder = None if self._final is None else self._final.with_name(self._final.name + ".partial")
        self.store: Store = final if self.folder is None else LocalStore(self.folder)
        self._prepared = False

    def finished_manifest(self) -> dict[str, Any] | None:
        """The manifest under the final name, if there is a sound one."""
        return _read_manifest(self._finished)

    def stored_plan(self) -> ConversionPlan | None:
        """The plan of an unfinished conversion."""
        try:
            return ConversionPlan.from_json(self.store.read_bytes(PLAN_FILE), f"{self.store.location}/{PLAN_FILE}")
        except FileNotFoundError:
            return None

    def settle(self, plan: ConversionPlan) -> ConversionPlan:
        """Stores `plan`, unless another part that started at the same time was faster; returns the one that counts."""
        with self._lock(".plan", shared=False) if self._final is not None else nullcontext():
            stored = self.stored_plan()
            if stored is None:
                self.store.write_bytes(PLAN_FILE, plan.to_json())
        return stored or plan

    def prepare(self, *, resume: bool, overwrite: bool, part: bool) -> bool:
        """Makes room for a conversion; returns False where it is already complete and `resume` asks for no more.

        What a killed run left is worth keeping once it holds a finished unit; before that it is cleared without asking, but not by
        a part, beside which others may just be starting.

        Raises:
            ShardError: something is in the way that the options do not allow to continue or replace; says which option would.
        """
        stands = self._stands()
        self._require_ours(self.store.location, _top_names(self.store.names()))
        begun = self._begun()
        if not (resume and begun):
            finished = stands and self.finished_manifest() is not None
            if finished and resume and not overwrite:
                return False
            if stands is not None and not overwrite and not (resume and not stands):
                raise ShardError(f"{self.out} exists already; add --overwrite to replace it or choose another --out")
            if begun and not overwrite:
                raise ShardError(
                    f"an unfinished conversion lies at {self.store.location}: --resume continues it, --overwrite starts over from nothing"
                )
            if not part:
                self.clear()
            elif stands and self.folder is None:
                raise ShardError(f"{self.out} holds shards that no part may replace by itself: remove them or choose another --out")
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._prepared = True
        return True

    def spool_folder(self, part: str) -> Path:
        """A local folder for what streams in; the same for a resumed run, another for every part."""
        if self.folder is not None:
            return self.folder / (SPOOL_FOLDER + part)
        owner = f"{os.getuid()}-{sha256(self.out.encode()).hexdigest()[:16]}"
        return Path(tempfile.gettempdir()) / f"bce3s-spool-{owner}{part}"

    def publish(self) -> None:
        """Removes what only an unfinished conversion needs and gives the folder its name; the manifest is already there."""
        self._remove_spools()
        if self.folder is not None and self._final is not None:
            shutil.rmtree(self.folder / UNIT_FOLDER, ignore_errors=True)
            self.store.delete(PLAN_FILE)
            publish_folder(self.folder, self._final)
            return
        for name in self.store.names(f"{UNIT_FOLDER}/"):
            self.store.delete(name)
        self.store.delete(PLAN_FILE)  # last: it says that there is something to remove

    def complete_partial(self) -> dict[str, Any] | None:
        """The manifest of a conversion that was killed between its last file and the end of `publish`."""
        if self.folder is None and self.store.size(PLAN_FILE) is None:
            return None
        return _read_manifest(self.store)

    @contextmanager
    def locked(self, part: str) -> Iterator[None]:
        """Keeps other runs away while the block lasts, of a part only those that are not other parts; object stores have no locks."""
        if self._final is None:
            yield
            return
        self._final.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(self._lock("", shared=bool(part)))
            if part:
                stack.enter_context(self._lock(part, shared=False))
            try:
                yield
            finally:
                if self._prepared and not part and not self._begun():
                    self.clear()

    @contextmanager
    def _lock(self, part: str, *, shared: bool) -> Iterator[None]:
        assert self._final is not None
        path = self._final.with_name(f"{self._final.name}{part}.lock")
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while (lock := _locked_file(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)) is None:
            if time.monotonic() > deadline:
                raise ShardError(f"another run is writing {self.out} (it holds {path}); wait for it or choose another --out")
            time.sleep(_LOCK_PATIENCE_S / 30)
        with lock:
            try:
                yield
            finally:
                if _flock(lock, fcntl.LOCK_EX):  # nobody shares it any more
                    path.unlink(missing_ok=True)

    def _stands(self) -> bool | None:
        """Whether shards stand at `out`, perhaps with a damaged manifest; None where nothing does, False for an empty folder.

        Raises:
            ShardError: something else stands there; it may be somebody's photographs.
        """
        if self._final is not None and not os.path.lexists(self._final):
            return None
        is_folder = self._final is None or self._final.is_dir()
        names = _top_names(self._finished.names()) if is_folder else [""]
        if self._final is None and (not names or (PLAN_FILE in names and MANIFEST_FILE not in names)):
            return None
        if names and not (index_file("train") in names or (MANIFEST_FILE in names and self.finished_manifest() is not None)):
            raise ShardError(f"{self.out} is not a shard folder, so --overwrite does not remove it; choose another --out")
        self._require_ours(self.out, names)
        return bool(names)

    def _require_ours(self, location: str, names: list[str]) -> None:
        foreign = [name for name in names if not _OURS.fullmatch(name)]
        if foreign:
            raise ShardError(f"{location} holds {foreign[0]}, which no conversion made: move it away or choose another --out")

    def _begun(self) -> bool:
        """True where an earlier run left something that took work."""
        if self.folder is not None:
            return any(any(self.folder.glob(pattern)) for pattern in (f"{UNIT_FOLDER}/*.json", f"{SPOOL_FOLDER}*/*.json", MANIFEST_FILE))
        if self.store.size(PLAN_FILE) is None:
            return False
        return any(self._spools()) or any(name == MANIFEST_FILE or name.startswith(f"{UNIT_FOLDER}/") for name in self.store.names())

    def clear(self) -> None:
        """Removes an unfinished conversion; in an object store, which cannot swap folders, also a finished one, its manifest first.

        Records go before the plan, so that however far this comes none is ever taken for one of another plan.
        """
        self._remove_spools()
        if self.folder is not None:
            shutil.rmtree(self.folder / UNIT_FOLDER, ignore_errors=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        self.store.delete(MANIFEST_FILE)
        for name in self.store.names():
            if name != PLAN_FILE:
                self.store.delete(name)
        self.store.delete(PLAN_FILE)

    def _spools(self) -> list[Path]:
        """The spool folders of all parts."""
        pattern = self.spool_folder("")
        return sorted(path for path in pattern.parent.glob(f"{pattern.name}*"))

    def _remove_spools(self) -> None:
        for path in self._spools():
            shutil.rmtree(path, ignore_errors=True)


def _top_names(names: list[str]) -> list[str]:
    """Names of the files and folders right there."""
    return sorted({name.partition("/")[0] for name in names})


def _locked_file(path: Path, kind: int) -> TextIO | None:
    """The lock file, open and locked; None while somebody else holds it."""
    file = path.open("a")
    try:
        # One that waited may have got the lock of a file that the run before it has removed since.
        if _flock(file, kind) and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except FileNotFoundError:
        pass
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def _flock(file: TextIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _read_manifest(store: Store) -> dict[str, Any] | None:
    try:
        content = store.read_bytes(MANIFEST_FILE)
    except OSError:
        return None
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(manifest, dict) and manifest.get("format") == FORMAT_NAME and not manifest_faults(manifest)
    return manifest if sound else None
