"""Makes FFCV's `.beton` file of a split out of its finished tars: sample i of the beton is id i.

JPEG bytes are copied as they are, so nothing is compressed twice; PNG, which FFCV cannot decode, becomes raw RGB.
FFCV's own `DatasetWriter` writes head and tail and its worker function the samples, but in this process: its pool waits for ever
when a worker dies, and several workers place samples in the order in which they happen to finish.
"""

from __future__ import annotations

import io
import os
import queue
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.durable import replacing
from pipelines.format.ffcv_package import import_ffcv
from pipelines.format.index import open_inside, sha256_file
from pipelines.format.reader import ByteArray, ShardSplit
from pipelines.types import IntArray, JsonValue, ShardError

# FFCV's file format, version 2, as ffcv/types.py has it. Restated, so that shards with a beton can be verified where FFCV is not installed.
HEADER_DTYPE = np.dtype([("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table_start", "<u8")])
FIELD_DTYPE = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
_IMAGE_DTYPE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("start", "<u8")])
SAMPLE_DTYPE = np.dtype({"names": ["image", "label"], "formats": [_IMAGE_DTYPE, "<i8"], "offsets": [0, 16], "itemsize": 24})
TABLE_DTYPE = np.dtype([("sample_id", "<u8"), ("start", "<u8"), ("size", "<u8")])
FIELDS = {"image": 2, "label": 1}  # name -> FFCV's number of RGBImageField and IntField
JPEG_MODE, RAW_MODE = 0, 1

_MIN_PAGE_BYTES = 8 << 20  # FFCV's default
_MAX_PAGE_BYTES = 1 << 30  # FFCV writes a page in one call, and Linux writes at most 2 GiB in one
_FIRST_BYTES = {b"\xff\xd8\xff": JPEG_MODE, b"\x89PN": RAW_MODE}


@dataclass(frozen=True, kw_only=True)
class BetonLayout:
    """Where everything lies in the beton of a split, known before a byte is written.

    Args:
        header: one record of `HEADER_DTYPE`.
        samples_N: `SAMPLE_DTYPE` [N].
        table_N: `TABLE_DTYPE` [N], in the order of ids.
        beton_bytes: size of the file.
    """

    header: NDArray[np.void]
    samples_N: NDArray[np.void]
    table_N: NDArray[np.void]
    beton_bytes: int


def plan_beton(split: ShardSplit) -> BetonLayout:
    """Lays out the beton of `split` (N > 0) as FFCV's writer does: samples one behind the other, none across the end of a page.

    Raises:
        ShardError: a sample is neither JPEG nor PNG, or too large for FFCV.
    """
    modes_N, encoded_bytes_N = _modes_and_sizes(split)
    sizes_N = np.where(modes_N == RAW_MODE, 3 * split.heights_N * split.widths_N, encoded_bytes_N)
    largest = int(sizes_N.argmax())
    page_size = max(_MIN_PAGE_BYTES, 1 << (int(sizes_N[largest]) - 1).bit_length())
    if page_size > _MAX_PAGE_BYTES:
        raise ShardError(f"{split.describe(largest)} takes {sizes_N[largest]} bytes, more than FFCV holds; leave the beton out")

    head_bytes = HEADER_DTYPE.itemsize + len(FIELDS) * FIELD_DTYPE.itemsize + len(split) * SAMPLE_DTYPE.itemsize
    pages_start = -(-head_bytes // page_size) * page_size
    starts, num_pages, used = [], 0, page_size
    for size in sizes_N.tolist():
        if size > page_size - used:
            num_pages, used = num_pages + 1, 0
        starts.append(pages_start + (num_pages - 1) * page_size + used)
        used += size
    samples_N = np.zeros(len(split), SAMPLE_DTYPE)
    table_N = np.zeros(len(split), TABLE_DTYPE)
    image_N = samples_N["image"]
    image_N["mode"], image_N["width"], image_N["height"], image_N["start"] = modes_N, split.widths_N, split.heights_N, starts
    samples_N["label"] = split.labels_N
    table_N["sample_id"], table_N["start"], table_N["size"] = np.arange(len(split)), starts, sizes_N
    table_start = pages_start + num_pages * page_size
    header = np.array((2, len(FIELDS), page_size, len(split), table_start), HEADER_DTYPE)
    return BetonLayout(header=header, samples_N=samples_N, table_N=table_N, beton_bytes=table_start + table_N.nbytes)


def require_ffcv() -> None:
    """Imports FFCV, which takes seconds, so that its absence shows before hours of work and not after.

    Raises:
        BackendError: it cannot be imported.
    """
    import_ffcv("ffcv.writer", "a .beton file")


def write_beton(split: ShardSplit, path: Path, *, on_samples: Callable[[int], None] = lambda count: None) -> dict[str, JsonValue] | None:
    """Writes the beton of `split` to `path`, whole or not at all; the same split gives the same bytes.

    Args:
        split: finished tars, mapped.
        path: of the beton, in an existing folder; replaced if there is one.
        on_samples: called in this thread with the number of samples written since the last call.

    Returns:
        Its manifest entry: file, num_samples, beton_bytes, sha256, fields, num_jpg, num_raw. None for a split of no samples, which
        FFCV cannot write: it has no beton.

    Raises:
        BackendError: FFCV cannot be imported.
        ShardError: a sample cannot be read or is too large, or the disk is full or read-only.
    """
    if not len(split):
        return None
    require_ffcv()
    layout = plan_beton(split)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata
        try:
            with replacing(path) as file:
                _require_space(path, layout.beton_bytes)
                _write_samples(Path(file.name), split, layout, on_samples)
                # FFCV does not look at how much of a page was written, which on a full disk is less than it asked for.
                written_bytes = os.fstat(file.fileno()).st_size
                if written_bytes != layout.beton_bytes:
                    raise ShardError(
                        f"cannot write {path}: {written_bytes} of {layout.beton_bytes} bytes arrived; make room and run this again"
                    )
        except OSError as error:
            raise ShardError(f"cannot write {path}: {error.strerror or error}; mend that and run this again") from error
    num_raw = int((layout.samples_N["image"]["mode"] == RAW_MODE).sum())
    return {
        "file": path.name,
        "num_samples": len(split),
        "beton_bytes": layout.beton_bytes,
        "sha256": sha256_file(path),
        "fields": list(FIELDS),
        "num_jpg": len(split) - num_raw,
        "num_raw": num_raw,
    }


def check_beton(path: Path, split: ShardSplit, *, on_samples: Callable[[int], None] = lambda count: None) -> Iterator[str]:
    """Compares the beton at `path` with the tars of `split`, byte for byte; needs no FFCV.

    Yields:
        A sentence for every fault, naming the path and, where it belongs to one sample, its id.

    Raises:
        ShardError: a sample of the tars cannot be read.
    """
    if not len(split):
        if path.exists():
            yield f"{path} should not exist: its split has no samples"
        return
    layout = plan_beton(split)
    try:
        with open_inside(path.parent, path.name) as file:
            content = np.memmap(file, np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        yield f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        return
    if len(content) != layout.beton_bytes:
        yield f"{path} has {len(content)} bytes instead of {layout.beton_bytes}"
        return
    head_bytes = HEADER_DTYPE.itemsize + len(FIELDS) * FIELD_DTYPE.itemsize
    header = content[: HEADER_DTYPE.itemsize].view(HEADER_DTYPE)[0]
    fields = content[HEADER_DTYPE.itemsize : head_bytes].view(FIELD_DTYPE)
    found_fields = dict(zip(fields["name"].tolist(), fields["type_id"].tolist(), strict=True))
    if header != layout.header or found_fields != {name.encode(): type_id for name, type_id in FIELDS.items()}:
        yield f"{path} has a header that does not fit its tars"
        return
    samples_N = content[head_bytes : head_bytes + layout.samples_N.nbytes].view(SAMPLE_DTYPE)
    table_N = content[int(header["table_start"]) :].view(TABLE_DTYPE)
    for sample_id, (start, size) in enumerate(zip(table_N["start"].tolist(), table_N["size"].tolist(), strict=True)):
        faults = _record_faults(samples_N[sample_id], layout.samples_N[sample_id])
        if table_N[sample_id] != layout.table_N[sample_id]:
            faults.append(f"its table entry is {table_N[sample_id]} instead of {layout.table_N[sample_id]}")
        elif not np.array_equal(content[start : start + size], _stored_bytes(split, sample_id, layout)):
            faults.append("its image differs from that of the tar")
        on_samples(1)
        yield from (f"{path}, sample {sample_id:08d}: {fault}" for fault in faults)


def _modes_and_sizes(split: ShardSplit) -> tuple[NDArray[np.uint8], IntArray]:
    """Of each sample FFCV's mode, uint8 [N], told by its first bytes, and the size of its encoded image in bytes, int64 [N]."""
    modes_N, encoded_bytes_N = np.zeros(len(split), np.uint8), np.zeros(len(split), np.int64)
    for sample_id in range(len(split)):
        encoded = _encoded(split, sample_id)
        mode = _FIRST_BYTES.get(encoded[:3].tobytes())
        if mode is None:
            raise ShardError(f"{split.describe(sample_id)} is neither JPEG nor PNG: copy the tar again or make the shards again")
        modes_N[sample_id], encoded_bytes_N[sample_id] = mode, len(encoded)
    return modes_N, encoded_bytes_N


def _encoded(split: ShardSplit, sample_id: int) -> ByteArray:
    return split.encoded(np.array([sample_id]))[0]


def _stored_bytes(split: ShardSplit, sample_id: int, layout: BetonLayout) -> ByteArray:
    """What the beton holds of a sample: JPEG bytes, a view into the tar, or the pixels of its PNG, uint8 [H·W·3]."""
    encoded = _encoded(split, sample_id)
    image = layout.samples_N["image"][sample_id]
    if image["mode"] == JPEG_MODE:
        return encoded
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as png:
            pixels_HWC = np.asarray(png.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and more
        raise ShardError(f"{split.describe(sample_id)} does not decode ({error}); copy the tar again or make the shards again") from error
    if pixels_HWC.shape[:2] != (image["height"], image["width"]):
        raise ShardError(f"{split.describe(sample_id)} has another size than its index says; make the shards again")
    return pixels_HWC.reshape(-1)


def _record_faults(found: np.void, expected: np.void) -> list[str]:
    """How the record of one sample differs from what it should be."""
    pairs = {"label": (found["label"], expected["label"])}
    pairs.update({name: (found["image"][name], expected["image"][name]) for name in _IMAGE_DTYPE.names or ()})
    return [f"its {name} is {is_} instead of {should_be}" for name, (is_, should_be) in pairs.items() if is_ != should_be]


def _require_space(path: Path, beton_bytes: int) -> None:
    free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < beton_bytes:
        raise ShardError(
            f"cannot write {path}: it takes {beton_bytes} bytes and the disk has {free_bytes} left; make room and run this again"
        )


def _write_samples(path: Path, split: ShardSplit, layout: BetonLayout, on_samples: Callable[[int], None]) -> None:
    """Runs FFCV's writer, with its worker function in this thread."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, worker_job_indexed_dataset

    class Allocator(MemoryAllocator):  # type: ignore[misc]
        """FFCV's, but after an error it closes its file and does not write, or wait, once more."""

        def __exit__(self, kind: type[BaseException] | None, value: object, traceback: object) -> None:
            try:
                if kind is None:
                    self.flush_page()
            finally:
                self.fp.close()

    image = RGBImageField()
    image.encode = _store_image  # on the instance: FFCV knows a field's number by its class, and a stock reader has to know it too
    fields = {"image": image, "label": IntField()}
    page_size = int(layout.header["page_size"])
    writer = DatasetWriter(str(path), fields, page_size=page_size, num_workers=1)
    writer.num_samples = len(split)
    writer.prepare()
    # Memory of this process in place of the shared one, which containers keep small and which outlives a killed process.
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    writer.metadata_sm = SimpleNamespace(buf=bytearray(layout.samples_N.nbytes))
    allocations: queue.SimpleQueue[list[tuple[int, int, int]]] = queue.SimpleQueue()
    worker_job_indexed_dataset(
        SimpleNamespace(get=partial(next, _todo(len(split), on_samples))),
        writer.metadata_sm,
        writer.metadata_type,
        fields,
        Allocator(str(path), writer.data_region_start, page_size),
        SimpleNamespace(get_lock=nullcontext, value=0),
        allocations,
        _Samples(split, layout),
    )
    writer.finalize(allocations.get())


def _todo(num_samples: int, on_samples: Callable[[int], None], chunk_size: int = 100) -> Iterator[list[tuple[int, int]] | None]:
    """FFCV's work queue: (place, sample id) in chunks, then None. It asks for the next chunk when it has written the one before."""
    for start in range(0, num_samples, chunk_size):
        chunk = range(start, min(start + chunk_size, num_samples))
        yield [(sample_id, sample_id) for sample_id in chunk]
        on_samples(len(chunk))
    yield None


class _Samples:
    """What FFCV's writer indexes: by sample id, the values of the two fields."""

    def __init__(self, split: ShardSplit, layout: BetonLayout) -> None:
        self._split = split
        self._layout = layout

    def __getitem__(self, sample_id: int) -> tuple[tuple[np.void, ByteArray], int]:
        image = self._layout.samples_N["image"][sample_id]
        return (image, _stored_bytes(self._split, sample_id, self._layout)), int(self._layout.samples_N["label"][sample_id])


def _store_image(destination: NDArray[np.void], value: tuple[np.void, ByteArray], malloc: Callable[[int], Any]) -> None:
    """In place of `RGBImageField.encode`, which would decode and compress anew: the bytes as they are."""
    image, content = value
    for name in ("mode", "width", "height"):
        destination[name] = image[name]
    destination["data_ptr"], storage = malloc(content.nbytes)
    storage[:] = content
