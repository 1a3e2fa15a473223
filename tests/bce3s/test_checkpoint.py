"""Checkpoints are whole or absent, and say in one sentence what is wrong with them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from bce3s.checkpoint import CheckpointError, load_checkpoint, require_same_data, save_checkpoint
from pipelines.durable import write_atomically
from pipelines.types import ConfigError

CPU = torch.device("cpu")


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", {"model": {"w": torch.arange(3)}, "epochs_done": 4})
    state = load_checkpoint(tmp_path / "last.pt", CPU)
    assert state["epochs_done"] == 4
    assert state["model"]["w"].tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_missing_checkpoint_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*last\.pt; train first with 'bce3s fast-train"):
        load_checkpoint(tmp_path / "last.pt", CPU)


def test_truncated_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": {"w": torch.zeros(1000)}})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
        load_checkpoint(path, CPU)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("saver", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch", "pickle"])
def test_loading_executes_no_pickled_code(tmp_path: Path, saver: object) -> None:
    saver({"format": "bce3s-checkpoint", "evil": Touch(tmp_path / "owned")}, tmp_path / "last.pt")  # type: ignore[operator]
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "last.pt", CPU)
    assert not (tmp_path / "owned").exists()


def test_foreign_and_future_files_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="is not a bce3s checkpoint"):
        load_checkpoint(tmp_path / "foreign.pt", CPU)
    torch.save({"format": "bce3s-checkpoint", "version": 99}, tmp_path / "future.pt")
    with pytest.raises(CheckpointError, match="checkpoint version 99, this program reads version 1"):
        load_checkpoint(tmp_path / "future.pt", CPU)


def test_failing_save_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", {"epochs_done": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path / "last.pt", {"broken": lambda: None})
    assert load_checkpoint(tmp_path / "last.pt", CPU)["epochs_done"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_write_atomically_replaces_or_leaves(tmp_path: Path) -> None:
    write_atomically(tmp_path / "config.json", b"one")
    write_atomically(tmp_path / "config.json", b"two")
    assert (tmp_path / "config.json").read_bytes() == b"two"
    assert len(list(tmp_path.iterdir())) == 1


def test_other_data_is_refused_by_name_and_by_content(tmp_path: Path) -> None:
    state = {"dataset": "cifar10-lt", "fingerprint": "abc"}
    require_same_data(state, tmp_path / "last.pt", "cifar10-lt", "abc", tmp_path)
    with pytest.raises(ConfigError, match=r"was trained on 'cifar10-lt', but .* holds 'demo'"):
        require_same_data(state, tmp_path / "last.pt", "demo", "abc", tmp_path)
    with pytest.raises(ConfigError, match="manifests differ"):
        require_same_data(state, tmp_path / "last.pt", "cifar10-lt", "xyz", tmp_path)
