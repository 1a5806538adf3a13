"""The supervisor process: ``python -m bento_service.jobs``.

SIGTERM drains: trainers checkpoint and their jobs are queued again. When the parent that started it dies (its
standard input closes), it ends at once and leaves the trainers running for the next supervisor to adopt.
"""

import select
import signal
import sys
import time

import structlog

from bento_service.jobs import host_lock
from bento_service.jobs.retention import expire
from bento_service.jobs.store import Store
from bento_service.jobs.supervisor import Supervisor
from bento_service.logs import configure_logs
from bento_service.settings import get_settings

_RETENTION_PERIOD_SECONDS = 600.0

log = structlog.get_logger("supervisor")


def main() -> int:
    settings = get_settings()
    configure_logs()
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # A parent holds the other end of standard input open and never writes: readable means that it is gone.
    watch_parent = not sys.stdin.isatty()

    def orphaned() -> bool:
        return watch_parent and bool(select.select([sys.stdin], [], [], 0)[0])

    lock = host_lock.hold(settings, lambda: stopping or orphaned())
    if lock is None:
        return 0
    store = Store.open(settings.sqlalchemy_url)
    supervisor = Supervisor(settings, store)
    log.info("supervisor started", home=str(settings.home), devices=supervisor.devices.describe())
    supervisor.reconcile()
    retention_due = 0.0
    while True:
        if stopping and not supervisor.draining:
            log.info("draining", running=len(supervisor.runs))
            supervisor.drain()
        if not stopping and orphaned():
            log.warning("parent gone, handing over", running=len(supervisor.runs))
            return 0
        supervisor.step()
        if supervisor.draining and not supervisor.runs:
            return 0
        host_lock.beat(settings)
        if time.monotonic() >= retention_due:
            retention_due = time.monotonic() + _RETENTION_PERIOD_SECONDS
            expire(settings, store)
        time.sleep(settings.poll_seconds)


if __name__ == "__main__":
    sys.exit(main())
