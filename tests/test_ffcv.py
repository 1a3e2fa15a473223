"""The optional FFCV extra works where it is installed: its own writer and reader take our shards' pixels in the order of our ids."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.format import ShardSplit


class Pixels:
    """What FFCV's DatasetWriter indexes: (image, label) by sample id."""

    def __init__(self, split: ShardSplit) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, sample_id: int) -> tuple[np.ndarray, int]:
        encoded = self._split.encoded(np.array([sample_id]))[0]
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            return np.asarray(image.convert("RGB")), int(self._split.labels_N[sample_id])


@pytest.mark.filterwarnings("ignore")  # FFCV 1.0.2 is from 2023; its warnings are not ours
def test_ffcv_writes_and_reads_our_samples(make_shards: Any, tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed; 'make env' names the line that installs what it needs")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    split = make_shards(train=(6, 3, 2, 2)).split("train")
    beton = tmp_path / "train.beton"
    writer = DatasetWriter(str(beton), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(Pixels(split), shuffle_indices=False)
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(str(beton), batch_size=13, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    ((images, labels),) = list(loader)
    assert labels[:, 0].tolist() == split.labels_N.tolist()
    for sample_id, pixels in enumerate(images):
        np.testing.assert_array_equal(pixels, Pixels(split)[sample_id][0])
