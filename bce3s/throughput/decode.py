"""Host read and decode alone, through the same DALI operators, feeding and options that the loader `dali` uses."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from os import sched_getaffinity
from typing import Any

import numpy as np
import torch

from bce3s.throughput.rows import HARDWARE_LOADS, Row
from bce3s.throughput.timing import MEASURED_FAILURES, Budget, Probe, reason_of, sample_in_turns
from bce3s.throughput.workload import Workload
from pipelines.loaders.plan import BatchPlan

_CPU = torch.device("cpu")
_PAGE = 4096
_REMEMBERED_S = 0.2  # shorter samples are too noisy for what later runs will rely on
_PAD_REASON = "crop 'pad' decodes whole images"


class DecodeStream:
    """A DALI pipeline that is fed the real order without end, and whose output is dropped.

    Args:
        workload: order and data.
        device: where DALI decodes.
        num_threads: of DALI; 0 is one per core.
        decode: "none" hands the encoded bytes through, "whole" or "region" decodes.
        load: share of the hardware decoder; None is the run's own.
    """

    def __init__(self, workload: Workload, device: torch.device, num_threads: int, decode: str, load: float | None = None) -> None:
        from pipelines.loaders.dali_package import fn, types
        from pipelines.loaders.dali_pipeline import ScheduledPipeline, new_pipeline
        from pipelines.loaders.damage import explain_failure, tiny_jpeg
        from pipelines.loaders.decoder_options import decoder_options

        request = workload.request(device, load)
        self.depth = depth = request.config.prefetch_batches
        self._workload, self._region = workload, decode == "region"

        def define() -> Any:
            pipeline = new_pipeline(request.max_samples, device, num_threads or request.num_threads, depth)
            with pipeline:
                outputs = fn.external_source(name="encoded", device="cpu", no_copy=True, dtype=types.UINT8, ndim=1)
                if decode == "region":
                    window = fn.external_source(name="window", device="cpu", dtype=types.INT32, ndim=1)
                    outputs = fn.decoders.image_slice(outputs, window[0:2], window[2:4], axes=[0, 1], **decoder_options(request))
                elif decode == "whole":
                    outputs = fn.decoders.image(outputs, **decoder_options(request))
                pipeline.set_outputs(outputs)
            pipeline.build()
            return pipeline

        tiny = {"encoded": [tiny_jpeg()], **({"window": np.array([[0, 0, 64, 64]], np.int32)} if self._region else {})}
        self._pipeline: ScheduledPipeline[BatchPlan, None] = ScheduledPipeline(
            define,
            depth=depth,
            device=device,
            tiny=tiny,
            take=lambda outputs: None,
            explain=lambda error, plans: explain_failure(error, workload.split, np.unique(np.concatenate([p.ids_S for p in plans]))),
        )
        self._stream: Generator[tuple[BatchPlan, None], None, None] = self._pipeline.run(self._items())

    def _items(self) -> Iterator[tuple[BatchPlan, dict[str, Any]]]:
        for plan in self._workload.plans():
            feed: dict[str, Any] = {"encoded": self._workload.split.encoded(plan.ids_S)}
            yield plan, {**feed, "window": plan.windows_S4} if self._region else feed

    def decode_batch(self) -> int:
        """One iteration; returns its images."""
        plan, _ = next(self._stream)
        return len(plan.ids_S)

    def close(self) -> None:
        """Frees DALI's threads and buffers."""
        self._stream.close()
        self._pipeline.close()


def host_read_rows(workload: Workload, budget: Budget) -> Iterator[Row]:
    """The rows "read.*": bytes reach the process, nobody decodes them."""
    plans = workload.plans()

    def touch() -> int:
        ids_S = next(plans).ids_S
        for encoded in workload.split.encoded(ids_S):
            encoded[::_PAGE].max()
        return len(ids_S)

    touched = sample_in_turns({"read.touch": Probe(work=touch)}, budget, _CPU)["read.touch"]
    yield _row("read.touch", touched, {})
    yield from _decode_rows({"read.dali": lambda: DecodeStream(workload, _CPU, 0, "none")}, budget, _CPU, {})


def host_decode_rows(workload: Workload, budget: Budget) -> Iterator[Row]:
    """The rows "decode.one.*" and "decode.all.*": DALI on the host's cores."""
    kinds = {"full": "whole", "region": "region"}
    all_threads = workload.config.data.num_threads
    for name, num_threads in (("one", 1), ("all", all_threads)):
        streams = {
            f"decode.{name}.{kind}": _opener(workload, _CPU, num_threads, decode)
            for kind, decode in kinds.items()
            if decode == "whole" or not _pads(workload)
        }
        yield from _decode_rows(streams, budget, _CPU, {"threads": num_threads or len(sched_getaffinity(0))})
        if _pads(workload):
            yield Row(key=f"decode.{name}.region", reason=_PAD_REASON)


def gpu_decode_rows(workload: Workload, budget: Budget) -> Iterator[Row]:
    """The rows "decode.gpu.*": DALI's `mixed` decoder over the shares of the hardware engine; needs CUDA. Remembers the best share.

    The last row is the run's own share, as its loader will take it after that.
    """
    try:
        from pipelines.loaders.decoder_options import remember_load
    except MEASURED_FAILURES as error:  # DALI is not installed
        yield from (Row(key=f"decode.gpu.{load:g}", reason=reason_of(error)) for load in HARDWARE_LOADS)
        yield Row(key="decode.gpu.own", reason=reason_of(error))
        return
    decode, device = "whole" if _pads(workload) else "region", workload.device
    swept: dict[float, Row] = {}
    for load in HARDWARE_LOADS:  # one after the other: each holds the engine and gigabytes of device memory
        streams = {f"decode.gpu.{load:g}": _opener(workload, device, workload.config.data.num_threads, decode, load)}
        for row in _decode_rows(streams, budget, device, {"decode": decode}):
            if row.rates:
                swept[load] = row
            yield row
    if swept and budget.seconds >= _REMEMBERED_S:
        try:
            remember_load(torch.cuda.get_device_name(device), max(swept, key=lambda load: swept[load].median))
        except OSError:
            pass  # a read-only home: the next run takes DALI's own share
    own, chosen_by = own_load(workload)
    details = {"decode": decode, "load": own, "chosen_by": chosen_by}
    if own in swept:
        yield Row(key="decode.gpu.own", rates=swept[own].rates, details=details)
    else:
        streams = {"decode.gpu.own": _opener(workload, device, workload.config.data.num_threads, decode)}
        yield from _decode_rows(streams, budget, device, details)


def own_load(workload: Workload) -> tuple[float, str]:
    """The share of the hardware decoder that the run takes now, and whence: "set", "profiled" on this machine, or DALI's "default".

    Needs DALI and CUDA.
    """
    from nvidia.dali.backend import GetSchema  # type: ignore[attr-defined]

    from pipelines.loaders.decoder_options import remembered_load

    load = workload.config.data.dali.hw_decoder_load
    if load >= 0:
        return load, "set"
    load = remembered_load(torch.cuda.get_device_name(workload.device))
    if load >= 0:
        return load, "profiled"
    return float(GetSchema("decoders__ImageSlice").GetArgumentDefaultValueString("hw_decoder_load")), "default"


def _pads(workload: Workload) -> bool:
    return workload.config.data.augment.crop == "pad"


def _opener(
    workload: Workload, device: torch.device, num_threads: int, decode: str, load: float | None = None
) -> Callable[[], DecodeStream]:
    return lambda: DecodeStream(workload, device, num_threads, decode, load)


def _decode_rows(
    openers: dict[str, Callable[[], DecodeStream]], budget: Budget, device: torch.device, details: dict[str, Any]
) -> Iterator[Row]:
    """One row a stream, measured in turns; a stream that cannot be opened is a row that was not measured."""
    streams: dict[str, DecodeStream] = {}
    try:
        for key, opener in openers.items():
            try:
                streams[key] = opener()
            except ImportError:
                yield Row(key=key, reason="NVIDIA DALI is not installed")
            except MEASURED_FAILURES as error:
                yield Row(key=key, reason=reason_of(error))
        probes = {key: Probe(work=stream.decode_batch, settle=_drain(stream)) for key, stream in streams.items()}
        for key, outcome in sample_in_turns(probes, budget, device).items():
            yield _row(key, outcome, details)
    finally:
        for stream in streams.values():
            stream.close()


def _drain(stream: DecodeStream) -> Callable[[], None]:
    """Takes out what was decoded ahead while something else was measured."""

    def drain() -> None:
        for _ in range(stream.depth):
            stream.decode_batch()

    return drain


def _row(key: str, outcome: tuple[float, ...] | str, details: dict[str, Any]) -> Row:
    return Row(key=key, reason=outcome) if isinstance(outcome, str) else Row(key=key, rates=outcome, details=details)
