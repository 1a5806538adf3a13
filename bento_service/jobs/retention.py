"""What is deleted of jobs that have ended, and when. Never of one that has not.

Job, events and metrics stay in the store; the checkpoints' rows go first, so that none of them ever names a folder
that is gone.
"""

import shutil
import time

import structlog

from bento_service.jobs.store import Store
from bento_service.settings import Settings

log = structlog.get_logger("retention")


def expire(settings: Settings, store: Store) -> list[str]:
    """Delete the run directories of jobs that ended longer ago than ``retention_days``; returns the jobs' ids."""
    if settings.retention_days is None:
        return []
    expired = store.expire_artifacts(ended_before=time.time() - settings.retention_days * 86400)
    for job_id in expired:
        _delete_run(settings, job_id)
        log.info("run directory deleted", job=job_id, days=settings.retention_days)
    return expired


def delete_model(settings: Settings, store: Store, job_id: str) -> None:
    """Delete the run directory of a job that has succeeded. Raises NotFound when it has none."""
    store.delete_model(job_id)
    _delete_run(settings, job_id)


def _delete_run(settings: Settings, job_id: str) -> None:
    folder = settings.runs_path / job_id
    if folder.exists():
        shutil.rmtree(folder)
