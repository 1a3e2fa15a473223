"""What Weights & Biases keeps of a run on disk, offline: nothing here touches a network."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bce3s.trackers import followed
from pipelines.types import BackendError
from tests.bce3s.progress.logs import SUMMARY, epoch_line, step_line, write_run
from tests.commands import finish_together

pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")

_BLOCK, _HEADER = 1 << 15, 7


def records(path: Path) -> Iterator[Any]:
    """Of a .wandb file, a LevelDB log of wandb's own messages."""
    from wandb.proto import wandb_internal_pb2

    data, position, message = path.read_bytes(), _HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        body = data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        message = body if kind in (1, 2) else message + body  # whole, first, middle, last
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record


def track(folder: Path, parts: list[tuple[int, list[dict[str, Any]]]]) -> None:
    """In a process of its own, for wandb's service lives as long as that."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_PROJECT": "long tails", "WANDB_CONFIG_DIR": str(folder), "WANDB_CACHE_DIR": str(folder)}
    said: list[str] = []
    for steps_done, lines in parts:
        with followed("wandb", folder, steps_done, said.append) as feeds:
            for line in lines:
                feeds[0](line)
    assert not said, said


def test_a_run_and_its_continuation_are_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a run", [])
    first, second = [step_line(0, 19), step_line(0, 39)], [step_line(0, 59, total=2.5), epoch_line(0, evaluated=True), SUMMARY]
    assert finish_together(track, [(folder, [(0, first), (40, second)])]) == [0]
    found = [list(records(path)) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]
    assert len(found) == 2
    identity = json.loads((folder / "wandb-run.json").read_text())
    for part in found:
        (begun,) = (record.run for record in part if record.HasField("run"))
        assert (begun.run_id, begun.project, begun.display_name) == (identity["id"], "long tails", "a run")
        assert {item.key for item in begun.config.update} >= {"dataset", "epochs", "loss"}
        assert [record.exit.exit_code for record in part if record.HasField("exit")] == [0]
    rows = [{item.nested_key[0]: json.loads(item.value_json) for item in record.history.item} for part in found for record in part]
    rows = [row for row in rows if "step" in row]
    assert [row["step"] for row in rows] == [20, 40, 60, 100]
    assert rows[2]["loss/total"] == 2.5
    assert rows[3]["val/all"] == 40.0
    summary = {item.key: item.value_json for record in found[1] for item in record.summary.update if record.HasField("summary")}
    assert float(summary["result/all"]) == 54.7


def start_without_login(folder: Path) -> None:
    os.environ |= {"WANDB_MODE": "online", "WANDB_CONFIG_DIR": str(folder), "HOME": str(folder), "NETRC": str(folder / "none")}
    os.environ |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "5"}
    os.environ.pop("WANDB_API_KEY", None)
    with pytest.raises(BackendError, match=r"--log wandb does not start \(.*\): run 'wandb login', or set WANDB_MODE=offline"):
        with followed("wandb", folder, 0, pytest.fail):
            pass


def test_nobody_logged_in_is_one_sentence(tmp_path: Path) -> None:
    assert finish_together(start_without_login, [(write_run(tmp_path, []),)]) == [0]
