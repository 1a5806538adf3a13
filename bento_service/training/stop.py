"""Stopping a trainer on request: SIGTERM or SIGINT."""

import signal
from types import FrameType


class StopRequested(BaseException):
    """Leaves whatever the trainer is doing. Not an Exception, so that no library swallows it on the way out."""


class StopSwitch:
    """Turned on by SIGTERM or SIGINT, once for all.

    Until ``defer()`` nothing is at stake (importing, loading, tokenizing) and the signal leaves the work at once by
    raising StopRequested. From then on it only sets ``requested``, and the training callbacks stop where the state
    is consistent.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def agreed(self) -> bool:
        """Whether to stop here. Of several ranks all ask at the same point and get the same answer (``rank``)."""
        return self.requested

    def install(self) -> None:
        """Take over both signals. Main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def defer(self) -> None:
        """From now on a signal only sets ``requested``."""
        self._deferred = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first = not self.requested
        self.requested = True
        if first and not self._deferred:
            raise StopRequested
