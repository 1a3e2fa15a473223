"""Whole training steps as CUDA graphs: one for each shape of batch and phase of the loss, replayed on new inputs.

A graph repeats the kernels of one step on the same addresses. What changes from step to step must therefore lie on the device: the batch is
copied into the addresses that were captured, the learning rate and the key of the draws are filled in place, and all else of a step is a
function of these and of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipelines.types import BackendError, Batch

Kind = tuple[Hashable, torch.Size]  # phase of the loss, shape of the images
WARM_UP_STEPS = 3  # real ones: they allocate what lives on, such as optimizer states and libraries' workspaces


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    terms: dict[str, Tensor]


class GraphedStep:
    """Runs `step` eagerly a few times for every kind of batch, then captures and replays it.

    Args:
        step: trains on a batch and returns its terms; allocates, waits for and decides nothing that depends on values.
        device: CUDA.
    """

    def __init__(self, step: Callable[[Batch], dict[str, Tensor]], device: torch.device) -> None:
        self._step, self._device = step, device
        self._num_warm: dict[Kind, int] = {}
        self._captured: dict[Kind, _Captured] = {}
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch, phase: Hashable) -> dict[str, Tensor]:
        """Trains on `batch`; the terms are valid until the next call.

        Raises:
            BackendError: the step cannot be captured.
        """
        kind = (phase, batch.images_SHWC.shape)
        captured = self._captured.get(kind)
        if captured is None:
            self._forget_other(phase, batch.images_SHWC.shape[1:])
            if self._num_warm.get(kind, 0) < WARM_UP_STEPS:
                self._num_warm[kind] = self._num_warm.get(kind, 0) + 1
                return self._eagerly(batch)
            captured = self._captured[kind] = self._capture(batch)
        assert batch.mix is not None, "a training batch carries its mix"
        assert captured.inputs.mix is not None, "it was captured from a training batch"
        captured.inputs.images_SHWC.copy_(batch.images_SHWC)
        captured.inputs.labels_S.copy_(batch.labels_S)
        captured.inputs.mix.copy_(batch.mix)
        captured.graph.replay()
        return captured.terms

    def _forget_other(self, phase: Hashable, image_shape: torch.Size) -> None:
        """Graphs of phases and image sizes that are over hold memory that the next eager steps need; they do not come back."""
        kept = {kind: each for kind, each in self._captured.items() if kind[0] == phase and kind[1][1:] == image_shape}
        if self._captured and not kept:
            self._pool = torch.cuda.graph_pool_handle()
        self._captured = kept

    def _eagerly(self, batch: Batch) -> dict[str, Tensor]:
        """On the stream that captures, as torch asks for: what is allocated for later steps belongs to it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            terms = self._step(batch)
        current.wait_stream(self._stream)
        for tensor in (batch.images_SHWC, batch.labels_S, batch.mix):
            if tensor is not None:
                tensor.record_stream(self._stream)
        for term in terms.values():
            term.record_stream(current)
        return terms

    def _capture(self, batch: Batch) -> _Captured:
        inputs = fixed_copy(batch)
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread is held to what a capture allows: loaders and the checkpoint's writer go on with their copies in theirs.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                terms = self._step(inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The end of a broken capture raises as well, about itself.
            reason = str(error.__context__ or error).splitlines()[0]
            raise BackendError(f"the step cannot be captured as a CUDA graph ({reason}); take --set cuda_graphs=false") from error
        return _Captured(graph, inputs, terms)


def fixed_copy(batch: Batch) -> Batch:
    """A batch in memory of its own: a loader may use its buffers again."""
    mix = None if batch.mix is None else batch.mix.clone()
    return replace(batch, images_SHWC=batch.images_SHWC.clone(), labels_S=batch.labels_S.clone(), mix=mix)
