"""A checkpoint gives back what was saved, is whole or absent, and says in one sentence what is wrong with it."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from bce3s.checkpoint import CheckpointError, NotFinite, load_checkpoint, require_same_data, save_checkpoint
from bce3s.checkpoint.tree import DTYPES
from pipelines.durable import write_atomically
from pipelines.types import ConfigError

CPU = torch.device("cpu")
STATE: dict[str, Any] = {
    "model": {"w": torch.arange(60.0), "seen": torch.tensor(7), "mask": torch.tensor([True, False, True])},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]},
    "epochs_done": 4,
    "best": None,
}


def assert_same(found: Any, expected: Any) -> None:
    """Types, order and values; tensors bit by bit, whatever their strides."""
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        # Copied into fresh memory first: an empty or expanded tensor has no bytes to view.
        pairs = [torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1).view(torch.uint8) for tensor in (found, expected)]
        assert torch.equal(*pairs)
        return
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert [(type(key), key) for key in found] == [(type(key), key) for key in expected]
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected
        assert str(found) == str(expected)  # −0.0 is not 0.0


@st.composite
def any_tensor(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size = torch.empty(shape).numel() * dtype.itemsize
    made = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)
    match draw(st.sampled_from(["as it is", "transposed", "strided", "expanded", "parameter"])):
        case "transposed":
            return made.transpose(0, -1) if made.ndim else made
        case "strided":
            return made[..., ::2] if made.ndim else made
        case "expanded":
            return made.expand(3, *shape)
        case "parameter":
            return torch.nn.Parameter(made, requires_grad=dtype.is_floating_point)
    return made


def any_state() -> st.SearchStrategy[dict[str, Any]]:
    plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
    keys = st.integers() | st.text(max_size=5) | st.sampled_from(["tensor", "dict", "tuple", "__metadata__", "a", "a.b", "a.b.c", "b.c"])
    nodes = st.recursive(
        plain | any_tensor(),
        lambda inner: st.dictionaries(keys, inner, max_size=4) | st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
        max_leaves=12,
    )
    return st.dictionaries(keys, nodes, max_size=5)


@given(state=any_state())
def test_every_state_comes_back(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("state") / "a.safetensors"
    save_checkpoint(path, state)
    assert_same(load_checkpoint(path, CPU), state)
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_tensors_that_share_memory_come_back_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tied = {"head": whole, "tied": whole, "row": whole[1], "tail": whole.view(-1)[5:], "photo": torch.rand(2, 3, 4, 5)}
    tied["photo"] = tied["photo"].to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "a", tied)
    found = load_checkpoint(tmp_path / "a", CPU)
    assert_same(found, tied)
    found["head"].zero_()
    assert_same({"tied": found["tied"], "row": found["row"]}, {"tied": tied["tied"], "row": tied["row"]})


def test_an_optimizer_and_its_network_go_on_from_it(tmp_path: Path) -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()

    models = [torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last) for _ in "ab"]
    first, second = ((model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)) for model in models)
    step(*first)
    save_checkpoint(tmp_path / "a", {"model": first[0].state_dict(), "optimizer": first[1].state_dict()})
    state = load_checkpoint(tmp_path / "a", CPU)
    second[0].load_state_dict(state["model"])
    second[1].load_state_dict(state["optimizer"])
    step(*first)
    step(*second)
    assert_same(second[0].state_dict(), first[0].state_dict())


def test_any_program_that_knows_safetensors_reads_the_weights(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", STATE)
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert set(found) == {"model.w", "model.seen", "model.mask", "optimizer.state.0.step"}
    assert torch.equal(found["model.w"], STATE["model"]["w"])


def test_a_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    save_checkpoint(tmp_path / "a", STATE)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"hooks": [None, print]}, r"cannot hold hooks\.1, which is a builtin_function_or_method"),
        ({"w": torch.zeros(2).to_sparse()}, "cannot hold w, which is a torch.sparse_coo tensor"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "cannot hold w, which is a torch.strided tensor of torch.complex64"),
        ({"a": {1.5: 0}}, r"cannot hold a, which has the key 1\.5"),
        ({True: 0}, "cannot hold the state, which has the key True"),
    ],
)
def test_what_cannot_be_saved_is_named_and_the_old_file_stands(tmp_path: Path, state: dict[Any, Any], sentence: str) -> None:
    save_checkpoint(tmp_path / "a", STATE)
    with pytest.raises(TypeError, match=sentence):
        save_checkpoint(tmp_path / "a", state)
    assert_same(load_checkpoint(tmp_path / "a", CPU), STATE)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_float_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    save_checkpoint(tmp_path / "a", STATE)
    with pytest.raises(NotFinite, match=r"cannot save .*a: losses\.1 is not finite; what was there before still stands"):
        save_checkpoint(tmp_path / "a", {"losses": (1.0, value)})
    assert_same(load_checkpoint(tmp_path / "a", CPU), STATE)


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        save_checkpoint(tmp_path / "a", STATE)
        return tmp_path / "a"

    def test_cut_short_anywhere(self, path: Path) -> None:
        content = path.read_bytes()
        for length in [*range(0, len(content), len(content) // 20), 1, 7, 8, len(content) - 1]:
            path.write_bytes(content[:length])
            with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
                load_checkpoint(path, CPU)

    def test_a_flipped_bit_anywhere(self, path: Path) -> None:
        content = path.read_bytes()
        header_length = 8 + int.from_bytes(content[:8], "little")
        silent = []
        for position in range(len(content)):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :])
            try:
                assert_same(load_checkpoint(path, CPU), STATE)  # a blank may become another kind of blank
            except CheckpointError:
                continue
            silent.append(position)
        assert all(content[position : position + 1] == b" " for position in silent)
        assert max(silent, default=0) < header_length
        assert len(silent) < 100

    def test_bytes_too_many(self, path: Path) -> None:
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
            load_checkpoint(path, CPU)

    @pytest.mark.parametrize(
        "tree",
        [
            {"dict": [["w", {"tensor": "w"}], ["again", {"tensor": "w"}]]},
            {"dict": [["w", {"tensor": "absent"}]]},
            {"dict": [["w", {"tensor": ["w"]}]]},
            {"dict": []},
            {"dict": [["w", {"tensor": "w"}], ["w", 1]]},
            {"dict": [["w", {"tensor": "w"}], [None, 1]]},
            {"dict": [["w", {"tensor": "w"}], ["x"]]},
            {"dict": [["w", {"tensor": "w"}], ["x", {"exec": "print()"}]]},
            {"dict": {"w": {"tensor": "w"}}},
            {"tensor": "w", "dict": []},
            {"tensor": "w"},
            [{"tensor": "w"}],
            None,
        ],
    )
    def test_values_that_this_program_never_writes(self, tmp_path: Path, tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Under a checksum that is right, as a file made by hand can have."""
        import bce3s.checkpoint.file as module

        path = tmp_path / "a"
        honest = json.dumps
        monkeypatch.setattr(module.json, "dumps", lambda value, **options: honest(tree if options == {"allow_nan": False} else value))
        save_checkpoint(path, {"w": torch.zeros(2)})
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
            load_checkpoint(path, CPU)

    def test_values_nested_beyond_reason(self, path: Path) -> None:
        write_header(path, {"__metadata__": {"format": "bce3s-checkpoint", "version": "2", "values": "[" * 200_000, "crc32": "0"}})
        with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
            load_checkpoint(path, CPU)
        path.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
        with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
            load_checkpoint(path, CPU)


def write_header(path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


class TestOtherFiles:
    def test_missing_names_the_command(self, tmp_path: Path) -> None:
        for path in (tmp_path / "a", tmp_path, tmp_path / "absent" / "a"):
            with pytest.raises(
                CheckpointError, match=rf"no checkpoint at {path}; train first with 'bce3s fast-train --dataset NAME --out {path.parent}'"
            ):
                load_checkpoint(path, CPU)

    def test_foreign_files(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "foreign")
        with pytest.raises(CheckpointError, match="foreign is not a bce3s checkpoint"):
            load_checkpoint(tmp_path / "foreign", CPU)
        for header in ([], {"__metadata__": 3}, {"__metadata__": {"format": "bce3s-shards"}}, "text", None):
            write_header(tmp_path / "foreign", header)
            with pytest.raises(CheckpointError, match="foreign is not a bce3s checkpoint"):
                load_checkpoint(tmp_path / "foreign", CPU)

    @pytest.mark.parametrize("version", ["1", "99", 2, None])
    def test_other_versions(self, tmp_path: Path, version: Any) -> None:
        write_header(tmp_path / "future", {"__metadata__": {"format": "bce3s-checkpoint", "version": version}})
        with pytest.raises(CheckpointError, match=f"future has checkpoint version {version}, this program reads version 2"):
            load_checkpoint(tmp_path / "future", CPU)

    @pytest.mark.parametrize("saver", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch", "pickle"])
    def test_no_pickled_code_is_executed(self, tmp_path: Path, saver: Callable[[Any, Path], Any]) -> None:
        saver({"format": "bce3s-checkpoint", "evil": Touch(tmp_path / "owned")}, tmp_path / "last.pt")
        with pytest.raises(CheckpointError, match=r"last\.pt is (not a bce3s checkpoint but a file of torch\.save|damaged or not)"):
            load_checkpoint(tmp_path / "last.pt", CPU)
        assert not (tmp_path / "owned").exists()


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestDisk:
    def assert_refused(self, path: Path, reason: int) -> None:
        sentence = rf"cannot save {path}: {os.strerror(reason)}; mend that, what was there before still stands"
        with pytest.raises(CheckpointError, match=sentence):
            save_checkpoint(path, {"w": torch.zeros(1 << 20)})
        assert_same(load_checkpoint(path, CPU), STATE)
        assert [file.name for file in path.parent.iterdir()] == [path.name]

    def test_full(self, small_disk: Callable[[str], Path]) -> None:
        path = small_disk("size=2m") / "a"
        save_checkpoint(path, STATE)
        self.assert_refused(path, errno.ENOSPC)

    def test_read_only(self, small_disk: Callable[[str], Path]) -> None:
        path = small_disk("size=8m") / "a"
        save_checkpoint(path, STATE)
        small_disk("remount,ro")
        self.assert_refused(path, errno.EROFS)

    def test_a_limit_on_file_sizes(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "a", STATE)
        with file_size_limit(1 << 20):
            self.assert_refused(tmp_path / "a", errno.EFBIG)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=f"cannot save .*: {os.strerror(errno.ENOENT)}"):
            save_checkpoint(tmp_path / "absent" / "a", STATE)


@pytest.mark.cuda
def test_from_one_device_to_another(tmp_path: Path) -> None:
    gpu = torch.device("cuda", 0)
    on_gpu = {"w": torch.rand(3, 4, 5, 6, device=gpu).to(memory_format=torch.channels_last), "n": torch.tensor(3, device=gpu)}
    save_checkpoint(tmp_path / "a", on_gpu)
    found = load_checkpoint(tmp_path / "a", gpu)
    assert {name: tensor.device for name, tensor in found.items()} == {"w": gpu, "n": gpu}
    assert_same(load_checkpoint(tmp_path / "a", CPU), {name: tensor.cpu() for name, tensor in on_gpu.items()})


def test_other_data_is_refused_by_name_and_by_content(tmp_path: Path) -> None:
    state = {"dataset": "cifar10-lt", "fingerprint": "abc"}
    require_same_data(state, tmp_path / "a", "cifar10-lt", "abc", tmp_path)
    with pytest.raises(ConfigError, match=r"was trained on 'cifar10-lt', but .* holds 'demo'"):
        require_same_data(state, tmp_path / "a", "demo", "abc", tmp_path)
    with pytest.raises(ConfigError, match="manifests differ"):
        require_same_data(state, tmp_path / "a", "cifar10-lt", "xyz", tmp_path)


def test_write_atomically_replaces_or_leaves(tmp_path: Path) -> None:
    write_atomically(tmp_path / "config.json", b"one")
    write_atomically(tmp_path / "config.json", b"two")
    assert (tmp_path / "config.json").read_bytes() == b"two"
    assert len(list(tmp_path.iterdir())) == 1
