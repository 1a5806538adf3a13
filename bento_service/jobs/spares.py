"""The spare trainers of a supervisor: how many there are, when one is started, which one takes the next job."""

import time
from collections.abc import Mapping, Sequence

import structlog

from bento_service import host_memory
from bento_service.jobs.launcher import SpareTrainer

log = structlog.get_logger("spares")

# With less memory available none is started. One takes 0.8 GB while it waits (docs/performance.md).
_NEEDED_BYTES = 2 * 2**30


class SpareTrainers:
    """At most ``count`` trainers that wait for a job. None is kept after ``close``."""

    def __init__(
        self,
        count: int,
        environment: Mapping[str, str],
        *,
        command: Sequence[str] | None = None,
        retry_seconds: float = 30,
    ) -> None:
        self._count = count
        self._command = command
        self._environment = environment
        self._retry_seconds = retry_seconds
        self._not_before = 0.0  # monotonic
        self.waiting: list[SpareTrainer] = []  # the oldest first

    def replenish(self, limit: int) -> None:
        """Start one if fewer than ``limit`` and the count wait; to be called again and again, when CPU can be spared.

        One that ended unasked shows trouble (no memory, a broken installation): the next is started
        ``retry_seconds`` later.
        """
        for spare in list(self.waiting):
            if (exit := spare.poll()) is not None:
                self.waiting.remove(spare)
                spare.kill()  # its process group, and our end of the socket
                self._not_before = time.monotonic() + self._retry_seconds
                log.warning("spare trainer ended", pid=spare.pid, reason=exit.describe())
        if len(self.waiting) >= min(self._count, limit) or time.monotonic() < self._not_before:
            return
        if host_memory.available() < _NEEDED_BYTES:
            return
        try:
            spare = SpareTrainer(self._environment, command=self._command)
        except OSError as error:
            self._not_before = time.monotonic() + self._retry_seconds
            log.warning("spare trainer not started", error=str(error))
            return
        self.waiting.append(spare)
        log.info("spare trainer started", pid=spare.pid)

    def pop(self) -> SpareTrainer | None:
        """The spare that has waited longest, for the caller to keep; None when no living one listens."""
        for spare in self.waiting:
            if spare.is_listening() and spare.poll() is None:
                self.waiting.remove(spare)
                return spare
        return None

    def close(self) -> None:
        """End those that wait, and start no more."""
        self._count = 0
        while self.waiting:
            self.waiting.pop().kill()
