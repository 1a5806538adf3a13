"""Who supervises on this host: a file lock that dies with its owner, and the owner's sign of life."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from bento_service.settings import Settings


def hold(settings: Settings, abandoned: Callable[[], bool]) -> int | None:
    """Wait for this host's lock; None when ``abandoned`` came true first. Closing the descriptor releases it."""
    settings.home.mkdir(parents=True, exist_ok=True)
    fd = os.open(settings.home / f"supervisor-{settings.host_name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if abandoned():
                os.close(fd)
                return None
            time.sleep(settings.poll_seconds)


def beat(settings: Settings) -> None:
    """Say that the supervisor in this process lives. The time is the file's modification time."""
    path = _heartbeat_file(settings)
    text = json.dumps({"pid": os.getpid()})
    if not path.exists() or path.read_text() != text:
        with contextlib.suppress(OSError):  # a full disk takes no pid, and does not need to: the time is what counts
            path.write_text(text)
    os.utime(path)


def is_beating(settings: Settings) -> bool:
    """Whether this host's supervisor gave a sign of life within the lease."""
    path = _heartbeat_file(settings)
    return path.exists() and time.time() - path.stat().st_mtime <= settings.lease_seconds


def supervisor_pid(settings: Settings) -> int | None:
    """The pid of this host's supervisor while it is beating; None otherwise."""
    if not is_beating(settings):
        return None
    text = _heartbeat_file(settings).read_text()
    return int(json.loads(text)["pid"]) if text else None


def _heartbeat_file(settings: Settings) -> Path:
    return settings.home / f"supervisor-{settings.host_name}.json"
