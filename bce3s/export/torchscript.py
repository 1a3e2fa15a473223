"""Format `torchscript`: a traced graph for libtorch and old deployments. torch has deprecated it since 2.9 and still reads it."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bce3s.export.formats import Format, GraphOptions, Opened
from bce3s.export.plain import Export
from bce3s.export.tracing import example, explained, input_text, traced

_METADATA_FILE = "metadata.json"


def _encode(export: Export, options: GraphOptions) -> dict[str, bytes]:
    buffer = io.BytesIO()
    with explained(export, "torchscript"), _deprecated():
        # torch's own check compares a trace with itself; ours reads it back from disk.
        graph = torch.jit.trace(traced(export, options), example(export, options), check_trace=False)
        torch.jit.save(graph, buffer, _extra_files={_METADATA_FILE: json.dumps(export.metadata())})
    return {"": _without_source_places(buffer.getvalue())}


def _without_source_places(archive: bytes) -> bytes:
    """The archive less its debugging records: the folders of whoever exported are nobody's business."""
    kept = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(kept, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(zipfile.ZipInfo(entry.filename), source.read(entry))
    return kept.getvalue()


def _open(path: Path, export: Export) -> Opened:
    with _deprecated():
        graph = torch.jit.load(str(path), map_location="cpu")
    return Opened(graph, "torch.jit")


@contextmanager
def _deprecated() -> Iterator[None]:
    """Whoever asks for TorchScript by name, and reads so in the model card, need not be told for every function of it."""
    with warnings.catch_warnings():
        # FutureWarning from torch 2.14 on; a tracer's fear, a shape taken for a constant, is what the check at several batch sizes finds.
        for kind in (DeprecationWarning, FutureWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", kind)
        yield


def _usage(export: Export, options: GraphOptions, name: str) -> str:
    return f"""import json

import torch

files = {{"{_METADATA_FILE}": ""}}
# torch has deprecated TorchScript; --format onnx is its successor.
model = torch.jit.load("{name}", map_location="cpu", _extra_files=files)
class_names = json.loads(json.loads(files["{_METADATA_FILE}"])["class_names"])
# images: {input_text(export, options)}
logits = model(images)
names = [class_names[k] for k in logits.argmax(1)]"""


FORMAT = Format(encode=_encode, open=_open, usage=_usage, suffix=".pt", options=("preprocess", "dynamic_size"))
