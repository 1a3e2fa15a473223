"""Loader `ffcv`: FFCV 1.0.2 reads the betons beside the tars; the same ids, crops and flips as every other loader, resumable exactly.

FFCV draws its crops in compiled threads that nobody can seed, and wants a whole epoch's order before its first batch. Here its iterator
is handed plans instead, one at a time: `_Ahead` is FFCV's thread and queue, `_PlannedCrops` stands where its decoders do, and the decoding
is done by FFCV's C library (ffcv_kernel.py). JPEG is decoded whole and on the CPU; a crop is resized by the mean over areas.
"""

from __future__ import annotations

import atexit
import threading
import warnings
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import repeat
from queue import Empty
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.format.ffcv_package import import_ffcv
from pipelines.format.reader import ByteArray
from pipelines.format.touch import read_ahead
from pipelines.loaders.damage import damage_sentence, pillow_pixels
from pipelines.loaders.ffcv_beton import Beton, open_beton
from pipelines.loaders.ffcv_kernel import decode_crops
from pipelines.loaders.plan import BatchPlan, reading_ahead
from pipelines.loaders.planned import PixelRequest
from pipelines.types import DamagedSampleError, IntArray

_ffcv: Any = import_ffcv("ffcv.loader", "loader 'ffcv'")
_rgb_image: Any = import_ffcv("ffcv.fields.rgb_image", "loader 'ffcv'")
_iterator: Any = import_ffcv("ffcv.loader.epoch_iterator", "loader 'ffcv'")
_compiler: Any = import_ffcv("ffcv.pipeline.compiler", "loader 'ffcv'")

# numba's fallback threading layer ends the process when two Python threads enter it; training and evaluation may overlap by a batch.
_DECODING = threading.Lock()


@dataclass(frozen=True, eq=False)
class _Job:
    """What FFCV's generated code passes to the decoder as the metadata of the image field."""

    plan: BatchPlan
    images_SHWC: NDArray[np.uint8]


class _PlannedCrops(_rgb_image.SimpleRGBImageDecoder):  # type: ignore[misc]
    """Decoder of FFCV's image field that crops and flips as the plan says."""

    def __init__(self, beton: Beton, image_size: int) -> None:
        super().__init__()
        self._beton, self._image_size = beton, image_size

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        """Asks for no memory: FFCV's is used again after a few batches, and holds every image at the size of the largest."""
        shape = (self._image_size, self._image_size, 3)
        return replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("u1")), None

    def generate_code(self) -> Any:
        """The function that FFCV calls for every batch."""
        beton = self._beton

        def decode(batch_indices: IntArray, memory: None, metadata: _Job, storage_state: tuple[Any, ...]) -> NDArray[np.uint8]:
            plan, images_SHWC = metadata.plan, metadata.images_SHWC
            _decode(beton, np.asarray(storage_state[0]), plan, images_SHWC)
            return images_SHWC

        return decode


def _decode(beton: Beton, content: ByteArray, plan: BatchPlan, images_SHWC: NDArray[np.uint8]) -> None:
    """Fills uint8 [S, size, size, 3]. Raises `DamagedSampleError` that names every sample of the batch that does not decode."""
    ids_S = plan.ids_S
    starts_S, sizes_S, heights_S, widths_S = (of_N[ids_S] for of_N in (beton.starts_N, beton.sizes_N, beton.heights_N, beton.widths_N))
    with _DECODING:
        complaints_S = decode_crops(
            content, starts_S, sizes_S, beton.are_jpeg_N[ids_S], heights_S, widths_S, plan.windows_S4, plan.flips_S, images_SHWC
        )
    damaged = []
    for i in np.flatnonzero(complaints_S).tolist():
        # libjpeg also complains of images that are whole, of bytes between two segments for example. Pillow tells them apart.
        one = slice(i, i + 1)
        pixels_HWC = pillow_pixels(content[starts_S[i] : starts_S[i] + sizes_S[i]], int(heights_S[i]), int(widths_S[i]))
        if pixels_HWC is None:
            damaged.append(int(ids_S[i]))
            continue
        pixels = pixels_HWC.reshape(-1)
        place = np.zeros(1, np.int64), np.array([len(pixels)]), np.zeros(1, np.bool_)
        with _DECODING:
            decode_crops(pixels, *place, heights_S[one], widths_S[one], plan.windows_S4[one], plan.flips_S[one], images_SHWC[one])
    if damaged:
        unique = np.unique(np.array(damaged, np.int64))
        named = [f"sample {sample_id:08d} of {beton.path}" for sample_id in unique[:5].tolist()]
        raise DamagedSampleError(damage_sentence(named, len(unique), beton.advice), unique)


class _Ahead(_iterator.EpochIterator):  # type: ignore[misc]
    """FFCV's iterator over an epoch: its thread decodes `prefetch_batches` batches ahead of who takes them."""

    def __init__(self, loader: Any, beton: Beton, plans: Iterator[BatchPlan], image_size: int, device: torch.device) -> None:
        self._plans, self._beton, self._image_size, self._device = plans, beton, image_size, device
        self._torch_threads = torch.get_num_threads()
        with _on(device):
            super().__init__(loader, [])  # starts the thread
        # A thread that still decodes when the interpreter goes down is torn out of C++, and the process aborts.
        atexit.register(self.finish)

    def start(self) -> None:
        """Starts the thread. FFCV has put its batches of indices together by now; `run_pipeline` does without them."""
        self.iter_ixes = repeat(())
        super().start()

    def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> tuple[BatchPlan, torch.Tensor] | Exception:
        """The next batch, or the error that ends the epoch; FFCV's own would only end the thread, and whoever waits would wait for ever."""
        if b_ix == 0:
            torch.set_num_threads(self._torch_threads)  # FFCV has just set torch's, for the whole process, to its own
        try:
            if self.terminate_event.is_set():
                raise StopIteration  # as at the end of the plans: FFCV's loop takes it for the end of the epoch
            plan = next(self._plans)
            self._beton.require_whole()
            shape = (len(plan.ids_S), self._image_size, self._image_size, 3)
            # Memory of its own, which lives as long as the batch does.
            images_SHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self.metadata = {"f0": _Job(plan, images_SHWC.numpy())}
            super().run_pipeline(b_ix, plan.ids_S, batch_slot, cuda_event)
            if self._device.type == "cuda":
                with torch.cuda.stream(self.cuda_streams[batch_slot]):
                    images_SHWC = images_SHWC.to(self._device, non_blocking=True)
            return plan, images_SHWC
        except StopIteration:
            raise
        except Exception as error:
            self._plans = iter(())
            return error

    def take(self) -> tuple[BatchPlan, torch.Tensor] | None:
        """The next batch, None after the last; its pixels are there for what is queued on the current stream from now on."""
        if self._device.type == "cuda":
            self.current_stream = torch.cuda.current_stream(self._device)  # FFCV has it wait for the copy
        found = next(self, None)
        if isinstance(found, Exception):
            raise found
        if found is not None and self._device.type == "cuda":
            found[1].record_stream(self.current_stream)
        return found

    def finish(self) -> None:
        """Ends the thread. FFCV's `close` alone would leave it waiting to hand over a batch that nobody takes."""
        atexit.unregister(self.finish)
        self.close()
        while self.is_alive():
            try:
                self.output_queue.get(timeout=0.02)
            except Empty:
                pass
        self.join()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """FFCV generates its code without compiling it, and leaves thread counts, warnings and numba's types as they are.

    Nothing is lost: what takes time is compiled in ffcv_kernel.py. What FFCV compiles complains when the interpreter ends.
    """
    num_threads = torch.get_num_threads(), numba.get_num_threads()
    # numba has one object for this type, and FFCV declares it read-only: nothing that writes bytes would compile any more.
    bytes_type = numba.uint8[::1]
    _compiler.Compiler.set_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bytes_type.mutable = True
        _compiler.Compiler.set_enabled(True)
        torch.set_num_threads(num_threads[0])
        numba.set_num_threads(num_threads[1])


class FfcvPixels:
    """Pixel source `ffcv`."""

    stored_sizes = None
    order = None

    def __init__(self, request: PixelRequest) -> None:
        """Opens the split's beton and looks whether it belongs to the split.

        Raises:
            ShardError: there is none, or it is damaged or another split's.
        """
        config = request.config
        self._request, self._beton = request, open_beton(request)
        # More threads than cores do not decode faster, and numba refuses them.
        num_cores: int = vars(numba.config)["NUMBA_NUM_THREADS"]
        num_workers = min(config.num_threads or num_cores, num_cores)
        with _uncompiled():
            self._loader = _ffcv.Loader(
                str(self._beton.path),
                batch_size=request.max_samples,
                num_workers=num_workers,
                os_cache=True,
                order=_ffcv.OrderOption.SEQUENTIAL,
                drop_last=False,
                batches_ahead=config.prefetch_batches,
                pipelines={"image": [_PlannedCrops(self._beton, config.image_size)], "label": None},
            )
        # FFCV maps the file once, when it is first asked to.
        self._address = self._loader.memory_manager.schedule_epoch([]).__enter__().state[0].ctypes.data

    def stream(self, plans: Iterator[BatchPlan]) -> Generator[tuple[BatchPlan, torch.Tensor], None, None]:
        """Decodes `prefetch_batches` batches ahead in FFCV's thread; plans are drawn there too.

        Raises:
            DamagedSampleError: samples do not decode.
            ShardError: the beton has become shorter.
        """
        request = self._request
        plans = reading_ahead(plans, self._request.config.prefetch_batches, self._advise)
        ahead = _Ahead(self._loader, self._beton, plans, request.config.image_size, request.device)
        try:
            while (batch := ahead.take()) is not None:
                yield batch
        finally:
            ahead.finish()

    def _advise(self, plan: BatchPlan) -> None:
        self._beton.require_whole()
        read_ahead(self._address + self._beton.starts_N[plan.ids_S], self._beton.sizes_N[plan.ids_S].astype(np.uint32))

    def close(self) -> None:
        """Frees FFCV's tables and the mapped beton."""
        self._loader = None
