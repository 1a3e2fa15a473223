"""The command line `bce3s`: its commands by name, each imported only when it is asked for.

Nothing but the standard library is imported before `main` runs, so `--help` is instant and Ctrl-C is heard from the first moment.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from bce3s.command_line.ending import run_app

if TYPE_CHECKING:
    import typer

__all__ = ["COMMANDS", "build_app", "main", "run_app"]

# In the order of a user's day; the sentence is the first of the command's docstring.
COMMANDS = {
    "fast-train": ("bce3s.fast_train.command:fast_train", "Train on shards, evaluate, and write the run to --out."),
    "watch": ("bce3s.watch.command:watch", "Follow a run from another terminal."),
    "evaluate": ("bce3s.evaluate.command:evaluate_run", "Evaluate a trained run, with and without flip test-time augmentation."),
    "retrain-classifier": (
        "bce3s.retrain.command:retrain_classifier",
        "Train the classifier of a finished run anew, on the features of its frozen backbone.",
    ),
    "report": ("bce3s.report.command:report", "Draw one page of figures of one or several runs."),
    "predict": ("bce3s.predict.command:predict", "Name the classes of images with a trained network."),
    "export": ("bce3s.export.command:export", "Write a trained network for other programs."),
    "reproduce": (
        "bce3s.reproduce.command:reproduce",
        "Train a published table again, and write it with the published figures beside ours.",
    ),
    "profile": ("bce3s.throughput.command:profile", "Measure every stage from disk to gradients, alone and together, and say what binds."),
    "doctor": ("bce3s.doctor.command:doctor", "Say what this machine has, what is missing and what to choose."),
}


@cache
def build_app() -> typer.Typer:
    """The application, as typer knows it; also the attribute `app` of this module."""
    from bce3s.command_line.lazy import Entry, build_application

    return build_application({name: Entry(*entry) for name, entry in COMMANDS.items()})


def __getattr__(name: str) -> Any:
    """`app`, built when it is asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build_app()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `bce3s` command, and of a process that is to behave as if it had been given `arguments`."""
    if arguments is not None:
        sys.argv[1:] = arguments
    run_app(build_app, "bce3s")


if __name__ == "__main__":
    main()
