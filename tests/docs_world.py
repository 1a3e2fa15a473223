"""A small machine on which the documentation's commands run as they are written: home, data sets, and the programs on its PATH.

What is small is the data and, by `SMALL`, the work: every command gets these flags after its own, and every network by its name is the
smallest one. Nothing else is changed. `bce3s` and the scripts run in forks of a process that has imported them (tests/commands.py);
`torchrun` has its flags parsed by its own parser and then runs the program once; `make env` finds its work done.
"""

from __future__ import annotations

import json
import os
import pickle
import runpy
import socket
import stat
import sys
import tarfile
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests import commands
from tests.conftest import encode, picture

ROOT = commands.ROOT
CLASSES = {"ant": 40, "bee": 24, "cicada": 12, "dragonfly": 8}
TINY = ("--set", "data.image_size=32", "--set", "data.num_threads=1")
SMALL: dict[str, tuple[str, ...]] = {
    "fast-train": ("--epochs", "1", *TINY),
    "retrain-classifier": ("--epochs", "1"),
    "reproduce": ("--list",),  # shows the table: tests/bce3s/reproduce trains some, which takes processes of their own
    "profile": ("--quick", "--batch-size", "8", *TINY),
    "make_shards.py": ("--limit", "60", "--processes", "1"),
}
_ALWAYS = {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "120"}
_SHADOWED = ("README.md", "tools", "benchmarks", "docs", "pipelines", "bce3s")  # what commands find beside them in a checkout

_CLIENT = """#!{python} -SE
import json, os, socket, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "python" and not (arguments and arguments[0].startswith(("tools/", "benchmarks/"))):
    os.execv({python!r}, [{python!r}, *arguments])
line = socket.socket(socket.AF_UNIX)
line.connect({socket!r})
asked = {{"name": name, "arguments": arguments, "cwd": os.getcwd(), "pid": os.getpid(), "environment": dict(os.environ)}}
line.sendall(json.dumps(asked).encode() + b"\\n")
sys.exit(int(line.makefile().readline()))
"""


def make_world(folder: Path) -> Path:
    """Fills `folder` with a home and a checkout to stand in; returns the checkout."""
    home, checkout = folder / "home", folder / "bce3s"
    checkout.mkdir(parents=True)
    for name in _SHADOWED:
        (checkout / name).symlink_to(ROOT / name)
    (checkout / "Makefile").write_text("env:\n\t@true\n")
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "activate").write_text(":\n")
    (checkout / "after.json").symlink_to("before.json")  # the profile after a change that changed nothing
    _photos(home / "photos")
    _photos(home / "new-photos")
    _cifar(home / "cifar")
    _imagenet_lt(home)
    _inat18(home, checkout)
    _places_lt(home / "places")
    return checkout


@contextmanager
def programs(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which a shell finds the programs, while they answer."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    short = tempfile.TemporaryDirectory()  # a socket's path has 107 bytes
    address = f"{short.name}/socket"
    for name in ("bce3s", "python", "torchrun"):
        client = bin_folder / name
        client.write_text(_CLIENT.format(python=sys.executable, socket=address))
        client.chmod(client.stat().st_mode | stat.S_IXUSR)
    with short, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        answering = threading.Thread(target=_answer_all, args=(listener,))
        answering.start()
        kept = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        try:
            yield kept | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HOME": str(folder / "home"), **_ALWAYS}
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closing alone would not
            answering.join()


def _answer_all(listener: socket.socket) -> None:
    while True:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_answer, args=(line,), daemon=True).start()


def _answer(line: socket.socket) -> None:
    with line:
        asked = json.loads(line.makefile().readline())
        [status] = commands.finish_together(_run_small, [(asked,)], timeout_s=240)
        line.sendall(f"{124 if status is None else status}\n".encode())


def _run_small(asked: dict[str, Any]) -> None:
    program, arguments = _program(asked["name"], asked["arguments"])
    script = Path(program).name
    command = script if script in SMALL else next((argument for argument in arguments if argument in SMALL), "")
    # What only shows or compares has no work that could be made smaller.
    is_idle = not {"--help", "--list", "--compare", "--dry-run", "merge", "--print-config"}.isdisjoint(arguments)
    _shrink_networks()
    _become(asked)
    try:
        sys.argv = [program, *arguments, *(() if is_idle else SMALL.get(command, ()))]
        if program == "bce3s":
            from bce3s.cli import main

            main(sys.argv[1:])
        else:
            runpy.run_path(program, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _become(asked: dict[str, Any]) -> None:
    """Takes the place of the process that asked: its folder, environment, input and outputs, which may be pipes."""
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "a", "stderr": "a"}.items()):
        with open(f"/proc/{asked['pid']}/fd/{number}", f"{mode}b", buffering=0) as file:
            os.dup2(file.fileno(), number)
        setattr(sys, name, open(number, mode.replace("a", "w"), encoding="utf-8", closefd=False))
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    warnings.simplefilter("error")


def _program(name: str, arguments: list[str]) -> tuple[str, list[str]]:
    if name == "python":
        return arguments[0], arguments[1:]
    if name == "torchrun":
        from torch.distributed.run import parse_args

        parsed = parse_args(arguments)
        assert (parsed.module, parsed.training_script) == (True, "bce3s.cli"), "torchrun runs -m bce3s.cli"
        return "bce3s", parsed.training_script_args
    return name, arguments


def _shrink_networks() -> None:
    from dataclasses import replace

    from bce3s.models import ARCHS

    smallest = ARCHS["resnet8-cifar"].build
    ARCHS.update({name: replace(entry, build=smallest) for name, entry in ARCHS.items()})


# ---- data in the layouts that people have


def _jpeg(path: Path, label: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(picture(label, number, 40, 48), "jpg"))


def _photos(root: Path) -> None:
    for label, (name, count) in enumerate(CLASSES.items()):
        for number in range(count):
            _jpeg(root / name / f"{number:03d}.jpg", label, number)


def _cifar(root: Path) -> None:
    """Both in the official layout; CIFAR-100 has its first twenty classes, and no image is more than noise in a corner."""
    rng = np.random.default_rng(0)

    def write(path: Path, counts: list[int], key: bytes) -> None:
        labels = np.repeat(np.arange(len(counts)), counts)
        pixels = np.zeros((len(labels), 3072), np.uint8)
        pixels[:, :16] = rng.integers(0, 256, (len(labels), 16))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps({b"data": pixels, key: labels.tolist()}, protocol=2))

    profile = [int(500 * 0.02 ** (k / 19)) for k in range(20)]  # enough for a factor of 50
    fine = root / "cifar-100-python"
    write(fine / "train", profile, b"fine_labels")
    write(fine / "test", [2] * 20, b"fine_labels")
    (fine / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"class-%d" % k for k in range(20)]}, protocol=2))


def _lists(path: Path, entries: list[tuple[str, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name} {label}\n" for name, label in entries))


def _imagenet_lt(home: Path) -> None:
    wnids = ("n01440764", "n01443537", "n01484850")
    named = {
        "train": [(f"train/{wnid}/{wnid}_{number}.JPEG", label) for label, wnid in enumerate(wnids) for number in range(9 - 3 * label)],
        "val": [(f"train/{wnid}/{wnid}_90.JPEG", label) for label, wnid in enumerate(wnids)],
        "test": [(f"val/{wnid}/ILSVRC2012_val_{label:08d}.JPEG", label) for label, wnid in enumerate(wnids)],
    }
    _write_listed(home / "ilsvrc", home / "ImageNet_LT", "ImageNet_LT", named)


def _places_lt(root: Path) -> None:
    folders = ("a/airfield", "a/airport_terminal", "b/beach")
    named = {
        "train": [
            (f"data_256/{folder}/{number:08d}.jpg", label) for label, folder in enumerate(folders) for number in range(9 - 3 * label)
        ],
        "val": [(f"data_256/{folder}/{90:08d}.jpg", label) for label, folder in enumerate(folders)],
        "test": [(f"val_256/Places365_val_{label:08d}.jpg", label) for label in range(3)],
    }
    _write_listed(root, root / "Places_LT", "Places_LT", named)


def _write_listed(images: Path, lists: Path, prefix: str, named: dict[str, list[tuple[str, int]]]) -> None:
    for split, entries in named.items():
        _lists(lists / f"{prefix}_{split}.txt", entries)
        for number, (name, label) in enumerate(entries):
            _jpeg(images / name, label, number)


def _inat18(home: Path, checkout: Path) -> None:
    groups = {"Plantae": 8, "Insecta": 5, "Aves": 3}
    images, lists = home / "inat2018", home / "inat2018"
    named = {
        "train": [(f"train_val2018/{group}/{k}/t{n}.jpg", k) for k, (group, count) in enumerate(groups.items()) for n in range(count)],
        "val": [(f"train_val2018/{group}/{k}/v0.jpg", k) for k, group in enumerate(groups)],
    }
    for split, entries in named.items():
        _lists(lists / f"iNaturalist18_{split}.txt", entries)
        for number, (name, label) in enumerate(entries):
            _jpeg(images / name, label, number)
    with tarfile.open(checkout / "train_val2018.tar.gz", "w:gz") as tar:
        tar.add(images / "train_val2018", "train_val2018")
