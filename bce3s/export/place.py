"""Where an export goes: whole under its name with its model card, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bce3s.export.timm_folder import CONFIG_FILE, WEIGHTS_FILE
from bce3s.train import TrainedNetwork
from pipelines.config import require
from pipelines.durable import publish_folder, sync_folder, write_atomically
from pipelines.types import ConfigError, UserError

FOLDER_CARD = "README.md"
_OURS = {WEIGHTS_FILE, CONFIG_FILE, FOLDER_CARD}


def default_out(trained: TrainedNetwork, suffix: str) -> Path:
    """RUN/export/ARCH with the format's suffix; for a checkpoint outside of a run, the folder `export` beside it."""
    return (trained.run or trained.path.parent) / "export" / (trained.config.model.title + (suffix or "-timm"))


def card_of(out: Path, suffix: str) -> Path:
    """The model card: FILE.md beside a file, README.md in a folder."""
    return out.with_name(f"{out.name}.md") if suffix else out / FOLDER_CARD


def require_room(out: Path, suffix: str, *, overwrite: bool) -> None:
    """Raises `ConfigError` unless an export and its card can go to `out`; nothing is replaced that is not an export."""
    anchor = next(parent for parent in out.absolute().parents if parent.exists())
    if not (anchor.is_dir() and os.access(anchor, os.W_OK)):
        raise ConfigError(f"{out} cannot be made, for {anchor} is no folder that can be written to; choose another --out")
    if suffix:
        require(not out.is_dir(), f"{out} is a folder, and this format is a file that ends in {suffix}; name one with --out")
        taken = [path for path in (out, card_of(out, suffix)) if path.exists()]
        require(not taken or overwrite, f"{taken[0] if taken else out} is there already; add --overwrite, or choose another --out")
        return
    if out.exists():
        foreign = not out.is_dir() or {path.name for path in out.iterdir()} - _OURS
        require(not foreign, f"{out} is there already and holds more than an export; choose another --out")
        require(overwrite or not any(out.iterdir()), f"{out} is there already; add --overwrite, or choose another --out")


@contextmanager
def staged(out: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """The files beside `out`, on disk but not under its name; gone when the block ends, unless they were put in place.

    Raises:
        UserError: the disk is full or the folder cannot be written to.
    """
    folder = out.with_name(f".{out.name}.bce3s-unfinished")
    try:
        with _explained(out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name, content in files.items():
                write_atomically(folder / (name or out.name), content)
        yield folder / out.name if "" in files else folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(path: Path, out: Path, card: str, suffix: str) -> None:
    """Moves what was staged at `path` to `out`, its card with it.

    Raises:
        UserError: the disk is full or the folder cannot be written to.
    """
    with _explained(out):
        if suffix:
            write_atomically(card_of(out, suffix), card.encode())
            path.replace(out)
            sync_folder(out.parent)
        else:
            write_atomically(path / FOLDER_CARD, card.encode())
            publish_folder(path, out)


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; mend that and try again") from error
