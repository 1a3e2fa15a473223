"""The command `bce3s watch`. Torch is imported only once it runs, so `--help` is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of the runs of several seeds.")],
    once: Annotated[bool, typer.Option("--once", help="Say how it stands now, and end.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks at its log.")] = 1.0,
) -> None:
    """Follow a run from another terminal."""
    import signal
    import sys

    from rich.console import Console

    from bce3s.watch.watching import Watching
    from pipelines.config import require

    require(0.05 <= interval <= 3600, f"--interval takes 0.05 to 3600 seconds, not {interval:g}")
    watching = Watching(run, Console())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through the end of the picture, which hides the cursor
    try:
        status = watching.show_once() if once else watching.follow(interval)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(status)
