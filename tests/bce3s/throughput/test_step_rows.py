"""What the step rows say beside their rates, and that decoding is that of the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bce3s.config import ModelConfig, TrainConfig
from bce3s.device import environment
from bce3s.throughput.chart import draw_chart
from bce3s.throughput.decode import DecodeStream
from bce3s.throughput.profile import facts_of, unlike_the_run
from bce3s.throughput.rows import Row
from bce3s.throughput.step_rows import measured_peak, multiplying_as_convolutions, with_mfu
from bce3s.throughput.timing import Budget
from bce3s.throughput.workload import Workload
from pipelines.config import DaliConfig, DataConfig


def test_mfu_counts_three_forward_passes_and_three_views_for_two_decoded_images() -> None:
    # 10 decoded images/s are 15 views/s; forward and backward of one view are 3 × 4 operations: 180 of 720 a second.
    rows = with_mfu([Row(key="step.contiguous", rates=(8.0, 10.0, 11.0)), Row(key="loader", rates=(5.0,))], 4.0, 720.0)
    assert rows[0].details["mfu"] == pytest.approx(0.25)
    assert (rows[0].details["flops_per_view_forward"], rows[0].details["measured_peak_flop_per_s"]) == (4.0, 720.0)
    assert rows[0].note == "MFU 25%"
    assert rows[1].details == {}


def test_without_a_peak_no_share_of_it_is_given() -> None:
    assert with_mfu([Row(key="step.contiguous", rates=(10.0,)), Row(key="step.graph", reason="no")], 4.0, 0.0)[0].details == {}


@pytest.fixture
def tf32_settings() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("tf32_settings")
@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_the_peak_takes_tf32_where_convolutions_do_and_leaves_the_setting_as_it_was(convolutions: bool, before: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before, convolutions
    seen = []

    def fail() -> None:
        with multiplying_as_convolutions():
            seen.append(torch.backends.cuda.matmul.allow_tf32)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert (seen, torch.backends.cuda.matmul.allow_tf32) == ([convolutions], before)


def of_photographs(make_shards: Any, **data: Any) -> Workload:
    config = TrainConfig(
        dataset="folder",
        device="cpu",
        precision="fp32",
        data=DataConfig(batch_size=8, image_size=16, num_threads=1, **data),
        model=ModelConfig(arch="resnet20-cifar"),
    )
    return Workload(config, make_shards(size=None, extension="jpg", name="folder"))


@pytest.mark.parametrize("decode", ["region", "whole"])
def test_the_decoder_gives_the_windows_of_the_plans_or_whole_images(make_shards: Any, decode: str) -> None:
    workload = of_photographs(make_shards)
    split, plan = workload.split, next(workload.plans())
    stream = DecodeStream(workload, torch.device("cpu"), 1, decode)
    shapes: list[list[tuple[int, ...]]] = []
    stream._pipeline._take = lambda outputs: shapes.append(outputs[0].shape())
    try:
        assert stream.decode_batch() == len(plan.ids_S)
    finally:
        stream.close()
    sizes = list(zip(split.heights_N[plan.ids_S].tolist(), split.widths_N[plan.ids_S].tolist(), strict=True))
    windows = [(height, width) for _, _, height, width in plan.windows_S4.tolist()]
    assert windows != sizes
    assert [shape[:2] for shape in shapes[0]] == (windows if decode == "region" else sizes)


def test_cores_are_those_this_process_may_use(make_shards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bce3s.throughput.profile.sched_getaffinity", lambda pid: {3, 5, 9})
    assert facts_of(of_photographs(make_shards)).num_cores == 3


@pytest.mark.parametrize(
    ("data", "sentences"),
    [
        ({"loader": "dali"}, []),
        ({"loader": "dali", "dali": DaliConfig(feed="index")}, ["fed from memory, the run's data.dali.feed=index"]),
        ({"loader": "webdataset"}, ["loader 'webdataset' reads whole shards"]),
    ],
)
def test_where_rows_read_otherwise_than_the_run_it_is_said(make_shards: Any, data: dict[str, Any], sentences: list[str]) -> None:
    said = unlike_the_run(of_photographs(make_shards, **data))
    assert len(said) == len(sentences)
    assert all(expected in sentence for expected, sentence in zip(sentences, said, strict=True))


def test_the_peak_is_measured(make_shards: Any) -> None:
    assert measured_peak(of_photographs(make_shards), Budget(repeats=5, seconds=0.001)) > 1e8


def test_the_environment_names_what_decodes_and_compiles() -> None:
    versions = environment(torch.device("cpu"))["versions"]
    assert {"torch", "torchvision", "triton", "ffcv"} <= set(versions)
    assert sum(name.startswith("nvidia-dali") for name in versions) == 1


def test_a_long_title_is_on_the_chart_in_full() -> None:
    title = " ".join(f"word{number}" for number in range(40))
    chart = draw_chart([Row(key="loader", rates=(5.0, 6.0))], None, title, ".svg").decode()
    assert all(f"word{number}" in chart for number in range(40))
    assert title not in chart  # which would run over the edge
