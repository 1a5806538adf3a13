"""A trainer's right to go on: a file that its supervisor touches with every heartbeat.

When the touches stop, the supervisor is dead, stopped or cut off, and after the lease another host may start the
same job. The trainer saves a checkpoint while there is time and is gone before the lease is over, so that no two
trainers ever write to one run directory. Touching needs no disk space, so a full disk does not end a lease.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

# Fractions of the lease without a touch. The rest is for the clock's grain and the watch's own period.
_CHECKPOINT_AT = 0.6
_EXIT_AT = 0.9

# sysexits.h EX_TEMPFAIL: try again later.
EXIT_STATUS = 75


def grant(path: Path, lease_seconds: float) -> None:
    """Write the lease; the time of the last touch is the file's modification time."""
    path.write_text(f"{lease_seconds}\n")


def renew(path: Path, at: float) -> None:
    """Date the lease from ``at`` (unix seconds) on. Raises FileNotFoundError when the run directory is gone."""
    os.utime(path, (at, at))


class LeaseWatch(threading.Thread):
    """Watches the lease beside the training loop: first SIGTERM to this process, then a hard exit.

    ``read`` happens once at the start; a missing file means that nobody leases (a recipe run by hand).
    """

    def __init__(self, path: Path, period: float = 0.5) -> None:
        super().__init__(name="lease-watch", daemon=True)
        self._path = path
        self._period = period

    def run(self) -> None:
        if not self._path.exists():
            return
        lease = float(self._path.read_text())
        asked = False
        while True:
            age = time.time() - self._path.stat().st_mtime if self._path.exists() else lease
            if age >= lease * _EXIT_AT:
                print(f"No supervisor for {age:.1f} s: the lease is over, exiting.", file=sys.stderr, flush=True)
                os._exit(EXIT_STATUS)
            if age >= lease * _CHECKPOINT_AT and not asked:
                asked = True
                print(f"No supervisor for {age:.1f} s: saving a checkpoint.", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(self._period)
