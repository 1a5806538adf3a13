"""Keeps a supervisor process alive beside an API worker, and knows whether one is."""

import os
import signal
import subprocess
import sys
import threading

import structlog

from bento_service.jobs import host_lock
from bento_service.jobs.launcher import PACKAGE_PARENT
from bento_service.settings import Settings

log = structlog.get_logger("keeper")

# A supervisor that cannot start (say, the database is away) is not restarted in a tight loop.
_RESTART_SECONDS = 1.0


class SupervisorKeeper:
    """Starts the supervisor as a child and starts it again whenever it ends.

    Several API workers on a host have a keeper each; their children share one lock, so that one of them works and
    the others stand by.

    With ``end_with_parent`` this process is told to stop (SIGTERM to itself) when the one that started it is gone.
    """

    def __init__(self, settings: Settings, *, end_with_parent: bool = False) -> None:
        self._settings = settings
        self._parent = os.getppid() if end_with_parent else None
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="supervisor-keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Drain: SIGTERM, then wait for the trainers' grace period. Returns when the supervisor has ended."""
        self._stopping.set()
        self._thread.join()

    def is_alive(self) -> bool:
        """Whether this host's supervisor, ours or another worker's, gave a sign of life lately."""
        return host_lock.is_beating(self._settings)

    def _keep(self) -> None:
        while not self._stopping.is_set():
            self._process = self._spawn()
            while self._process.poll() is None and not self._stopping.wait(0.1):
                self._notice_dead_parent()
            if not self._stopping.is_set():
                log.warning("supervisor ended, starting another", exit_code=self._process.returncode)
                self._stopping.wait(_RESTART_SECONDS)
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(self._settings.grace_seconds + 10)
            except subprocess.TimeoutExpired:
                log.error("supervisor did not drain in time, killed; the next one adopts its trainers")
                self._process.kill()
                self._process.wait()

    def _notice_dead_parent(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            log.warning("parent gone, stopping", parent=self._parent)
            self._parent = None
            os.kill(os.getpid(), signal.SIGTERM)

    def _spawn(self) -> subprocess.Popen[bytes]:
        rest = os.environ.get("PYTHONPATH")
        python_path = PACKAGE_PARENT + (os.pathsep + rest if rest else "")
        return subprocess.Popen(
            [sys.executable, "-m", "bento_service.jobs"],
            stdin=subprocess.PIPE,  # never written: it closes when this process dies
            env={**os.environ, "PYTHONPATH": python_path},
        )
