"""Stopping in good order."""

import signal
from types import FrameType


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a flag, so that work can be finished and saved; the second one kills.

    Use it as a context manager, in the main thread.

    Attributes:
        requested: Whether a signal has come.

    Example:
        >>> with StopSignals() as stop:
        ...     stop.requested
        False
    """

    def __init__(self):
        self.requested = False
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
