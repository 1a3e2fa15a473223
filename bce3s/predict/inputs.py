"""Which files a command line names: files, folders with all their images, and paths from standard input."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from pipelines.datasets.files import IMAGE_SUFFIXES, printable
from pipelines.types import ConfigError, DatasetError

STANDARD_INPUT = "-"
_READ_BYTES = 1 << 16


def image_paths(named: Sequence[str]) -> Iterator[str]:
    """The paths of all images that `named` stands for, found as they are asked for.

    A file is taken as it is; a folder stands for every file in it and below whose suffix is an image's, by name, hidden ones left out;
    "-" stands for the paths on standard input, one a line.

    Raises:
        DatasetError: a folder cannot be listed.
    """
    for name in named:
        if name == STANDARD_INPUT:
            yield from _lines()
        elif os.path.isdir(name):
            yield from _below(name, ())
        else:
            yield name


def require_inputs(named: Sequence[str]) -> None:
    """Raises unless everything named is there and every folder holds an image.

    Raises:
        ConfigError: nothing is named, or standard input twice.
        DatasetError: a path that does not exist or is neither file nor folder, or a folder without images.
    """
    if not named:
        raise ConfigError("no image is named; give files, folders, or - for paths on standard input")
    if list(named).count(STANDARD_INPUT) > 1:
        raise ConfigError("- stands for standard input, which can be read once: give it once")
    for name in named:
        if name == STANDARD_INPUT or os.path.isfile(name):
            continue
        if not os.path.exists(name):
            raise DatasetError(f"{printable(name)} does not exist; name an image, a folder of images, or - for paths on standard input")
        if not os.path.isdir(name):
            raise DatasetError(f"{printable(name)} is neither a file nor a folder; name an image or a folder of images")
        if next(_below(name, ()), None) is None:
            raise DatasetError(f"{printable(name)} holds no images ({' '.join(IMAGE_SUFFIXES)}), nor does a folder in it; name another")


def _below(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Images of `folder` and then of its folders, sorted by name; a link to a folder that it lies in is passed over."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as listing:
            entries = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(f"cannot list {printable(folder)} ({error.strerror}): make it readable and run the command again") from error
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    yield from (entry.path for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES) and _may_be_read(entry))
    for entry in entries:
        if os.path.isdir(entry.path):
            yield from _below(entry.path, (*above, identity))


def _may_be_read(entry: os.DirEntry[str]) -> bool:
    """A file, or a link to what is none, which is complained of when it is its turn; no folder, and no pipe, whose reader would wait."""
    return os.path.isfile(entry.path) or (entry.is_symlink() and not os.path.exists(entry.path))


def _lines() -> Iterator[str]:
    """Paths on standard input, as bytes the file system understands; empty lines are passed over.

    Read without Python's buffer, whose lock a thread that waits here would still hold when the interpreter ends.
    """
    rest = b""
    while block := os.read(0, _READ_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        yield from (os.fsdecode(line.rstrip(b"\r")) for line in lines if line.strip())
    if rest.strip():
        yield os.fsdecode(rest)
