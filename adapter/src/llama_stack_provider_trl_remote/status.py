"""A job of the training service as Llama Stack's status and artifacts."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from . import compat
from .errors import ServiceUnavailable
from .service import Checkpoint, Job

# A paused job holds no device and waits to go on, which is what "scheduled" says.
STATUS = {
    "validating_files": compat.JobStatus.scheduled,
    "queued": compat.JobStatus.scheduled,
    "paused": compat.JobStatus.scheduled,
    "running": compat.JobStatus.in_progress,
    "succeeded": compat.JobStatus.completed,
    "failed": compat.JobStatus.failed,
    "cancelled": compat.JobStatus.cancelled,
}


def job_status(job: Job, checkpoints: Sequence[Checkpoint], base_url: str) -> compat.PostTrainingJobStatusResponse:
    """Llama Stack has no fields for progress, metrics or errors: they travel in ``resources_allocated``."""
    if job.status not in STATUS:
        raise ServiceUnavailable(
            f"The training service at {base_url} reports the unknown status {job.status!r} for job {job.id}: "
            "update llama-stack-provider-trl-remote to the service's version"
        )
    progress: dict[str, Any] = dict(job.trl.progress or {})
    metrics, baseline, evaluation = (progress.pop(key, {}) for key in ("metrics", "baseline", "evaluation"))
    return compat.PostTrainingJobStatusResponse(
        job_uuid=job.job_uuid,
        status=STATUS[job.status],
        scheduled_at=_moment(job.created_at),
        started_at=_moment(job.trl.started_at),
        completed_at=_moment(job.finished_at),
        checkpoints=[checkpoint_of(job, checkpoint) for checkpoint in checkpoints],
        resources_allocated={
            "service_job_id": job.id,
            "service_status": job.status,
            "job_url": f"{base_url}/v1/fine_tuning/jobs/{job.id}",
            "model": job.model,
            "fine_tuned_model": job.fine_tuned_model,
            "attempt": job.trl.attempt,
            "wanted": job.trl.wanted,
            "queue_position": job.trl.queue_position,
            "estimated_finish": job.estimated_finish,
            "progress": progress,
            "metrics": metrics,
            "baseline": baseline,
            "evaluation": evaluation,
            "checkpoint_metrics": {checkpoint.id: checkpoint.trl.metrics for checkpoint in checkpoints},
            "error": None if job.error is None else job.error.model_dump(),
        },
    )


def checkpoint_of(job: Job, checkpoint: Checkpoint) -> compat.Checkpoint:
    """``path`` is on the service's host; ``epoch`` counts the epochs completed.

    ``training_metrics`` stays empty: Llama Stack's metrics require a perplexity, and a preference objective has none
    (exp of the DPO loss is not one). The values are in the status, ``checkpoint_metrics``.
    """
    return compat.Checkpoint(
        identifier=checkpoint.id,
        created_at=_moment(checkpoint.created_at),
        # The end of an epoch can come out as 0.9999... of it.
        epoch=math.floor(checkpoint.trl.epoch + 1e-3),
        post_training_job_id=job.job_uuid,
        path=checkpoint.trl.path,
        training_metrics=None,
    )


def _moment(unix_seconds: int | None) -> datetime | None:
    return None if unix_seconds is None else datetime.fromtimestamp(unix_seconds, UTC)
