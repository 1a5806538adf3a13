"""A job of the training service as Llama Stack's status and artifacts."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from .errors import ServiceUnavailable
from .protocol import (
    Checkpoint as StackCheckpoint,
)
from .protocol import JobStatus, PostTrainingJobStatusResponse, PostTrainingMetric
from .service import Checkpoint, Job

LARGEST_EXPONENT = 700  # exp() of more is no float

# A paused job holds no device and waits to go on, which is what "scheduled" says.
STATUS = {
    "validating_files": JobStatus.scheduled,
    "queued": JobStatus.scheduled,
    "paused": JobStatus.scheduled,
    "running": JobStatus.in_progress,
    "succeeded": JobStatus.completed,
    "failed": JobStatus.failed,
    "cancelled": JobStatus.cancelled,
}


def job_status(job: Job, checkpoints: Sequence[Checkpoint], base_url: str) -> PostTrainingJobStatusResponse:
    """Llama Stack has no fields for progress, metrics or errors: they travel in ``resources_allocated``."""
    if job.status not in STATUS:
        raise ServiceUnavailable(
            f"The training service at {base_url} reports the unknown status {job.status!r} for job {job.id}: "
            "update llama-stack-provider-trl-remote to the service's version"
        )
    progress: dict[str, Any] = dict(job.trl.progress or {})
    metrics, baseline, evaluation = (progress.pop(key, {}) for key in ("metrics", "baseline", "evaluation"))
    return PostTrainingJobStatusResponse(
        job_uuid=job.job_uuid,
        status=STATUS[job.status],
        scheduled_at=_moment(job.created_at),
        started_at=_moment_or_none(job.trl.started_at),
        completed_at=_moment_or_none(job.finished_at),
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


def checkpoint_of(job: Job, checkpoint: Checkpoint) -> StackCheckpoint:
    """``path`` is on the service's host; ``epoch`` counts the epochs completed."""
    # The end of an epoch can come out as 0.9999... of it.
    epoch = math.floor(checkpoint.trl.epoch + 1e-3)
    return StackCheckpoint(
        identifier=checkpoint.id,
        created_at=_moment(checkpoint.created_at),
        epoch=epoch,
        post_training_job_id=job.job_uuid,
        path=checkpoint.trl.path,
        training_metrics=_metrics(job, epoch, checkpoint.trl.metrics),
    )


def _metrics(job: Job, epoch: int, values: dict[str, Any]) -> PostTrainingMetric:
    """Perplexity is exp of a mean cross-entropy over tokens: of the validation loss where there is one. A preference
    objective has none (exp of the DPO loss is not one)."""
    train, validation = values.get("loss"), values.get("eval_loss")
    entropy = train if validation is None else validation
    perplexity = None
    if job.kind == "supervised" and entropy is not None and entropy < LARGEST_EXPONENT:
        perplexity = math.exp(entropy)
    return PostTrainingMetric(epoch=epoch, train_loss=train, validation_loss=validation, perplexity=perplexity)


def _moment(unix_seconds: int) -> datetime:
    return datetime.fromtimestamp(unix_seconds, UTC)


def _moment_or_none(unix_seconds: int | None) -> datetime | None:
    return None if unix_seconds is None else _moment(unix_seconds)
