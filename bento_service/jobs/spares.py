"""The spare trainers of a supervisor: how many there are, when one is started, which one takes the next job."""

import time
from collections.abc import Mapping

import psutil
import structlog

from bento_service.jobs.launcher import SpareTrainer

log = structlog.get_logger("spares")

# With less memory available none is started. One takes 0.8 GB while it waits (docs/performance.md).
_NEEDED_BYTES = 2 * 2**30


class SpareTrainers:
    """At most ``count`` trainers that wait for a job. None is kept after ``close``."""

    def __init__(self, count: int, environment: Mapping[str, str], *, retry_seconds: float = 30) -> None:
        self._count = count
        self._environment = environment
        self._retry_seconds = retry_seconds
        self._not_before = 0.0  # monotonic
        self._waiting: list[SpareTrainer] = []

    def replenish(self, limit: int) -> None:
        """Start what is missing, one at a time, so that ``limit`` or the count wait; call it when CPU can be spared.

        One that ended unasked shows trouble (no memory, a broken installation): the next is started
        ``retry_seconds`` later.
        """
        for spare in list(self._waiting):
            if (exit := spare.poll()) is not None:
                self._waiting.remove(spare)
                spare.kill()  # its process group, and our end of the socket
                self._not_before = time.monotonic() + self._retry_seconds
                log.warning("spare trainer ended", pid=spare.pid, reason=exit.describe())
        if len(self._waiting) >= min(self._count, limit) or time.monotonic() < self._not_before:
            return
        if psutil.virtual_memory().available < _NEEDED_BYTES:
            return
        try:
            spare = SpareTrainer(self._environment)
        except OSError as error:
            self._not_before = time.monotonic() + self._retry_seconds
            log.warning("spare trainer not started", error=str(error))
            return
        self._waiting.append(spare)
        log.info("spare trainer started", pid=spare.pid)

    def pop(self) -> SpareTrainer | None:
        """The spare that has waited longest and lives; None when there is none. It is the caller's."""
        while self._waiting:
            spare = self._waiting.pop(0)
            if spare.poll() is None:
                return spare
            spare.kill()
        return None

    @property
    def pids(self) -> list[int]:
        return [spare.pid for spare in self._waiting]

    def close(self) -> None:
        """End those that wait, and start no more."""
        self._count = 0
        while (spare := self.pop()) is not None:
            spare.kill()
