"""A terminal for tests: a real pty with a program in it, and what a person would see on its screen."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType

from tests import commands

_CONTROL = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\r\n|\r|\n|\x1b.")


class Terminal:
    """A pty of `width` × `height`. Programs write to `path`; `screen` is what stands there after all they wrote so far.

    Attributes:
        overflows: lines that were longer than the terminal is wide, which it would have wrapped.
    """

    def __init__(self, width: int, height: int) -> None:
        self._master, self._slave = os.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.path, self.width, self.height = Path(os.ttyname(self._slave)), width, height
        self.raw, self._decoded = b"", 0
        self._lines: list[list[str]] = [[]]
        self._row = self._column = 0
        self.cursor_shown = True
        self.overflows: list[str] = []

    @property
    def variables(self) -> dict[str, str]:
        """Of the environment of a program in it."""
        return {"COLUMNS": str(self.width), "LINES": str(self.height), "TERM": "xterm-256color"}

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._master)
        os.close(self._slave)

    def read(self, seconds: float = 0.05) -> None:
        """Takes in what is written until nothing comes for so long."""
        while select.select([self._master], [], [], seconds)[0]:
            self.raw += os.read(self._master, 1 << 16)
        self._draw()

    def type(self, keys: bytes) -> None:
        """As from the keyboard: the terminal echoes them where the cursor is, ^C too. Nobody is sent a signal."""
        os.write(self._master, keys)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"it did not show in time:\n{self.text}"
            self.read()

    @property
    def text(self) -> str:
        """Everything from the first line on, scrolled away or not, as it stands."""
        return "\n".join("".join(line).rstrip() for line in self._lines).rstrip()

    def _draw(self) -> None:
        text = self.raw.decode(errors="ignore")
        new, self._decoded = text[self._decoded :], len(text)
        position = 0
        for control in _CONTROL.finditer(new):
            self._write(new[position : control.start()])
            position = control.end()
            self._obey(control)
        self._write(new[position:])

    def _write(self, text: str) -> None:
        for character in text:
            line = self._lines[self._row]
            line.extend(" " * (self._column + 1 - len(line)))
            line[self._column] = character
            self._column += 1
        if self._column > self.width:
            self.overflows.append("".join(self._lines[self._row]))

    def _obey(self, control: re.Match[str]) -> None:
        argument, command = control[1] or "", control[2]
        if control[0] in ("\r", "\n", "\r\n"):
            self._column = 0
            if control[0] != "\r":
                self._row += 1
                self._lines.extend([] for _ in range(self._row + 1 - len(self._lines)))
        elif command == "A":
            self._row = max(0, self._row - int(argument or 1))
        elif command == "K":
            self._lines[self._row] = [] if argument == "2" else self._lines[self._row][: self._column]
        elif argument == "?25" and command in "hl":
            self.cursor_shown = command == "h"


def begin_in(terminal: Terminal, arguments: list[str], cwd: Path, **variables: str) -> ForkServerProcess:
    """The command `bce3s` with these arguments in a terminal, beside the test."""
    environment = {**os.environ, "PYTHONPATH": str(commands.ROOT), **terminal.variables, **variables}
    process = commands._PROCESSES.Process(target=_become, args=(arguments, str(terminal.path), str(cwd), environment))
    process.start()
    return process


def _become(arguments: list[str], terminal: str, cwd: str, environment: dict[str, str]) -> None:
    # Streams that know of the terminal from the start, as those of a process that a shell starts.
    with open(terminal, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", buffering=1, closefd=False) for number in (1, 2))
    commands._become("bce3s", arguments, terminal, terminal, cwd, environment)
