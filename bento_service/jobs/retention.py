"""What is deleted of jobs that have ended, and when. Never of one that has not."""

import shutil
import time

import structlog

from bento_service.jobs.store import Store
from bento_service.settings import Settings

log = structlog.get_logger("retention")


def expire(settings: Settings, store: Store) -> list[str]:
    """Delete the run directories of jobs that ended longer ago than ``retention_days``; returns the jobs' ids.

    Job, events and metrics stay in the store; the checkpoints' rows go first, so that none of them ever names a
    folder that is gone.
    """
    if settings.retention_days is None:
        return []
    expired = store.expire_artifacts(ended_before=time.time() - settings.retention_days * 86400)
    for job_id in expired:
        folder = settings.runs_path / job_id
        if folder.exists():
            shutil.rmtree(folder)
        log.info("run directory deleted", job=job_id, days=settings.retention_days)
    return expired
