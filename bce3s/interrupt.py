"""A polite end: SIGTERM and SIGINT ask a run to stop at the next step boundary instead of tearing it apart."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, remembers the first SIGTERM or SIGINT; a second SIGINT interrupts at once, as a person who presses it twice wants.

    Python handles signals in the main thread only; entered elsewhere, it never hears one.

    Attributes:
        name: of the signal that asked, such as "SIGTERM"; None as long as nobody has.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._interrupted = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        """Listens."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.name = self.name or signal.Signals(number).name
