"""Format `onnx`: the computation as an ONNX graph with a free batch size, checked against ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bce3s.export.formats import Format, GraphOptions, Opened
from bce3s.export.plain import Export
from bce3s.export.tracing import example, explained, input_text, traced
from pipelines.config import require

OLDEST_OPSET = 18
"""The first that torch writes, and the one that most runtimes read: the default."""


def _encode(export: Export, options: GraphOptions) -> dict[str, bytes]:
    import onnx

    opset, newest = options.opset or OLDEST_OPSET, onnx.defs.onnx_opset_version()
    require(OLDEST_OPSET <= opset <= newest, f"--opset lies from {OLDEST_OPSET} to {newest} here, not {opset}")
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    if options.dynamic_size:
        height, width = (1, 2) if options.preprocess else (2, 3)
        free |= {height: torch.export.Dim("height"), width: torch.export.Dim("width")}
    with explained(export, "onnx"), _quiet():
        program = torch.onnx.export(
            traced(export, options),
            (example(export, options),),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": free},
            verbose=False,
        )
        assert program is not None, "the exporter of torch.export returns a program"
        model = program.model_proto
        written = {entry.domain: entry.version for entry in model.opset_import}[""]
    require(written == opset, f"torch cannot write this network with --opset {opset}, only with {written}; leave --opset out")
    _forget_where(model.graph)
    onnx.helper.set_model_props(model, export.metadata())
    onnx.checker.check_model(model)
    return {"": model.SerializeToString()}


def _forget_where(graph: Any) -> None:
    """Drops what the exporter notes of the Python source: the folders of whoever exported are nobody's business."""
    del graph.metadata_props[:]
    for part in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for entry in part:
            del entry.metadata_props[:]
            entry.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on itself: packages it would also support, names it is about to rename."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _open(path: Path, export: Export) -> Opened:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return Opened(run, f"ONNX Runtime {onnxruntime.__version__}")


def _usage(export: Export, options: GraphOptions, name: str) -> str:
    return f"""import json

import onnxruntime

session = onnxruntime.InferenceSession("{name}")
class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
# images: {input_text(export, options)}
(logits,) = session.run(["logits"], {{"images": images}})
names = [class_names[k] for k in logits.argmax(1)]"""


FORMAT = Format(
    encode=_encode,
    open=_open,
    usage=_usage,
    suffix=".onnx",
    options=("preprocess", "opset", "dynamic_size"),
    packages=("onnx", "onnxscript", "onnxruntime"),
    extra="export",
)
