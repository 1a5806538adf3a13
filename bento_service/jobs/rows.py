"""Database rows to domain objects and back: plain conversions, no queries."""

from collections.abc import Mapping
from typing import Any

from bento_service.jobs.job import (
    Attempt,
    Checkpoint,
    Job,
    JobError,
    JobEvent,
    JobRequest,
    JobStatus,
    Progress,
    StoredFile,
)
from bento_service.training.spec import TrainingSpec

Row = Mapping[str, Any]

# Requests and specs never change once stored, and checking them anew is a good part of a status request.
_DEFINITIONS = 1024
_definitions: dict[tuple[str, str], tuple[JobRequest, TrainingSpec]] = {}


def job_values(job: Job) -> dict[str, Any]:
    """The columns of a new job."""
    return {
        "id": job.id,
        "client_id": job.client_id,
        "digest": job.request.digest,
        "request": job.request.to_json(),
        "spec": job.spec.model_dump(mode="json"),
        "metadata": job.request.metadata,
        "training_file": job.request.training_file,
        "validation_file": job.request.validation_file,
        "submitted_by": job.submitted_by,
        "fine_tuned_model": job.fine_tuned_model,
        "status": job.status.value,
        "priority": job.priority,
        "devices": job.devices,
        "created_at": job.created_at,
        "progress": {},
    }


def job_from_row(row: Row) -> Job:
    request, spec = _definition(row)
    return Job(
        id=row["id"],
        client_id=row["client_id"],
        request=request,
        spec=spec,
        status=JobStatus(row["status"]),
        priority=row["priority"],
        devices=row["devices"],
        created_at=row["created_at"],
        queued_at=row["queued_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        progress=progress_from_json(row["progress"]),
        error=None if row["error"] is None else JobError(**row["error"]),
        wanted=row["wanted"],
        attempt=row["attempt"],
        lease_token=row["lease_token"],
        submitted_by=row["submitted_by"],
        fine_tuned_model=row["fine_tuned_model"],
    )


def _definition(row: Row) -> tuple[JobRequest, TrainingSpec]:
    key = (row["id"], row["digest"])
    found = _definitions.get(key)
    if found is None:
        found = JobRequest.from_json(row["request"]), TrainingSpec.model_validate(row["spec"])
        if len(_definitions) >= _DEFINITIONS:
            _definitions.clear()
        _definitions[key] = found
    return found


def progress_from_json(value: Row) -> Progress:
    return Progress(**{key: value[key] for key in Progress.__dataclass_fields__ if key in value})


def job_event_from_row(row: Row) -> JobEvent:
    return JobEvent(
        id=event_id(row["job_id"], row["seq"]),
        job_id=row["job_id"],
        seq=row["seq"],
        created_at=row["created_at"],
        type=row["type"],
        level=row["level"],
        message=row["message"],
        data=row["data"],
    )


def checkpoint_from_row(row: Row) -> Checkpoint:
    return Checkpoint(
        id=checkpoint_id(row["job_id"], row["step"]), **{key: row[key] for key in row if key not in {"id"}}
    )


def attempt_from_row(row: Row) -> Attempt:
    return Attempt(**row)


def file_from_row(row: Row) -> StoredFile:
    return StoredFile(**{key: value for key, value in row.items() if key != "number"})


def event_id(job_id: str, seq: int) -> str:
    return f"ftevent-{job_id.removeprefix('ftjob-')}-{seq}"


def checkpoint_id(job_id: str, step: int) -> str:
    return f"ftckpt-{job_id.removeprefix('ftjob-')}-{step}"


def number_in_id(identifier: str) -> int | None:
    """The seq or step at the end of an event or checkpoint id; None when it has none."""
    digits = identifier.rpartition("-")[2]
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 16 else None
