"""Stopping a trainer on request: SIGTERM or SIGINT."""

import signal
from types import FrameType


class StopRequested(BaseException):
    """Leaves whatever the trainer is doing. Not an Exception, so that no library swallows it on the way out."""


class StopSwitch:
    """Turned on by SIGTERM or SIGINT, once for all.

    While nothing is at stake (importing, loading, tokenizing) the signal leaves the work at once by raising
    StopRequested. Between ``defer()`` and the end of training it only sets ``requested``, and the training callbacks
    stop where the state is consistent.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def install(self) -> None:
        """Take over both signals. Main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def defer(self) -> None:
        """From now on a signal waits for the callbacks. Raises StopRequested if one has already come."""
        self._deferred = True
        if self.requested:
            raise StopRequested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first = not self.requested
        self.requested = True
        if first and not self._deferred:
            raise StopRequested
