"""How a command line ends: one sentence and an exit status, whatever happened (docs/cli.md lists them).

Imports nothing but the standard library, so that it is there before anything slow is imported.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import typer

DONE = 0
CHECK_FAILED = 1  # the command ran, and what it checked does not hold
MISTAKE = 2  # of the user or the machine, said in one sentence
BUG = 70  # EX_SOFTWARE of sysexits.h; not Python's 1, which a script would take for a failed check
INTERRUPTED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + signal.SIGPIPE  # the reader of the output has gone, as after `| head -1`
TRACEBACK_VARIABLE = "BCE3S_TRACEBACK"

# What a machine refuses, and what to do about it. Any other OSError is a file that we should have looked for: a bug.
_REFUSALS = {
    errno.ENOSPC: "make room there, or name another place",
    errno.EDQUOT: "make room there, or name another place",
    errno.EACCES: "ask for the permission, or name another place",
    errno.EPERM: "ask for the permission, or name another place",
    errno.EROFS: "name another place with --out",
    errno.EMFILE: "raise the limit with 'ulimit -n 65536' and start again",
    errno.ENFILE: "close other programs, or have the machine's limit raised (sysctl fs.file-max)",
    errno.ENOMEM: "close other programs, or take fewer workers",
    errno.EIO: "look at the disk and its cables with 'dmesg'",
    errno.ESTALE: "look at the network file system and start again",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class _Interrupts:
    """Ctrl-C raises `KeyboardInterrupt`, as Python has it, and is remembered, for whoever catches it may raise something else.

    Inside an import it ends the process at once: an extension module that meets an exception while it is set up may abort with a dump of
    the stack, as torch does. Nothing is half written then that is not whole or absent anyway.
    """

    def __init__(self) -> None:
        self.heard = False
        # A shell starts background jobs with the signal ignored, and so they stay. An embedding program keeps its handler, too.
        own = threading.current_thread() is threading.main_thread()
        if own and signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(signal.SIGINT, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                os._exit(INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt


def die_of_interrupts() -> None:
    """From now on Ctrl-C ends the process at once and without a word: for the start of a script and its end, where nothing is half done."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_app(application: typer.Typer | Callable[[], typer.Typer], program: str | None = None) -> NoReturn:
    """Runs a command line on `sys.argv` and exits.

    Args:
        application: of typer, or what imports and gives it.
        program: its name in help and errors; default that of the script.
    """
    interrupts = _Interrupts()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with suppress(OSError):  # standard output was moved to a terminal after the process began
                stream.reconfigure(errors="backslashreplace")  # paths may hold what no terminal shows
    try:
        status = _run(application, program)
        sys.stdout.flush()
    except BaseException as error:  # the last to be asked: every way to end goes through here
        try:
            status = _status_after(error, interrupts.heard)
        except (BrokenPipeError, KeyboardInterrupt) as again:
            status = PIPE_CLOSED if isinstance(again, BrokenPipeError) else INTERRUPTED
    die_of_interrupts()
    _discard_unwritable()
    sys.exit(status)


def _run(application: typer.Typer | Callable[[], typer.Typer], program: str | None) -> int:
    import typer
    from typer.main import get_command

    app = application if isinstance(application, typer.Typer) else application()
    # Not as typer would end the process: its boxes, its status 1, and its tracebacks of signals are not ours.
    found = get_command(app).main(prog_name=program, standalone_mode=False)
    return found if isinstance(found, int) else DONE


def _status_after(error: BaseException, interrupted: bool) -> int:
    """Says what happened, and what the process is to end with."""
    if isinstance(error, SystemExit):
        # rich and typer turn a closed pipe into status 1, which is that of a failed check.
        closed = isinstance(error.__context__, BrokenPipeError)
        return PIPE_CLOSED if closed else _code(error)
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    if interrupted or isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    sentence = sentence_of(error)
    if sentence is not None:
        print(f"error: {sentence}", file=sys.stderr)  # noqa: T201
        return MISTAKE
    if type(error).__name__ == "NoArgsIsHelpError":  # the help has been shown
        return MISTAKE
    if not os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    print("error: this is a bug of bce3s: please report it with the lines above and the command", file=sys.stderr)  # noqa: T201
    return BUG


def _code(error: SystemExit) -> int:
    if isinstance(error.code, str):
        print(error.code, file=sys.stderr)  # noqa: T201
        return MISTAKE
    return error.code or DONE


def sentence_of(error: BaseException) -> str | None:
    """What to say of a mistake of the user or the machine; None of a bug."""
    from pipelines.types import UserError

    if isinstance(error, UserError):
        return str(error)
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # of the parser, whose package depends on typer's version
        return None if type(error).__name__ == "NoArgsIsHelpError" else _usage_sentence(error)
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror or os.strerror(error.errno)}; {_REFUSALS[error.errno]}"
    if isinstance(error, MemoryError):
        return "the memory of this machine is full; close other programs, or take a smaller --batch-size or fewer workers"
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which may not have been imported
        return f"the GPU's memory is full ({str(error).splitlines()[0].rstrip('.')}); take a smaller --batch-size"
    return None


def _usage_sentence(error: Any) -> str:
    """As in: no such option --datset; did you mean --dataset?; see 'bce3s fast-train --help'."""
    option, close = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    if option is not None and hasattr(error, "possibilities"):
        said = f"no such option {option}" + (f"; did you mean {close[0]}?" if close else "")
    else:
        said = " ".join(error.format_message().split()).rstrip(".").replace(". Did you", "; did you")
    context = getattr(error, "ctx", None)
    where = f"; see '{context.command_path} --help'" if context is not None else ""
    return said[:1].lower() + said[1:] + where


def _discard_unwritable() -> None:
    """Output that cannot be written, because nobody reads it or the disk is full: Python would complain once more when it flushes."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
