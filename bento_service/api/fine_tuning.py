"""``/v1/fine_tuning/jobs``: submit, follow and stop jobs, and list their checkpoints."""

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from bento_service.api.context import After, Impl, JobId, Limit, error_answers
from bento_service.api.wire import CheckpointObject, CreateJob, EventObject, JobObject, ListOf, page_of
from bento_service.errors import InvalidRequest

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning"])

ClientId = Annotated[str | None, Query(max_length=256, description="Only the job with this `trl.client_id`.")]

_METADATA_KEY = re.compile(r"metadata\[([^\]]{1,64})\]")

_METADATA_FILTER: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
            "description": "`metadata[k]=v`: only jobs that have all these pairs.",
        }
    ]
}


@router.post("", summary="Submit a job", responses=error_answers(400, 409, 413))
def create_job(body: CreateJob, impl: Impl) -> JobObject:
    """Check the model, the data and the options, and queue the job.

    Whatever cannot be trained on is refused here, and nothing of it is stored; a job that is answered is safe on
    disk. With `trl.client_id`, the same request again answers the same job, and another one under this id 409.
    """
    return JobObject.of(impl.submit(body.to_request()))


@router.get("", summary="List jobs", responses=error_answers(400, 404), openapi_extra=_METADATA_FILTER)
def list_jobs(
    request: Request,
    impl: Impl,
    after: After = None,
    limit: Limit = 20,
    client_id: ClientId = None,
) -> ListOf[JobObject]:
    """Newest first."""
    page = impl.list_jobs(after=after, limit=limit, metadata=_metadata_filter(request), client_id=client_id)
    return page_of(page, [JobObject.of(job) for job in page.data])


@router.get("/{job_id}", summary="Describe a job", responses=error_answers(404))
def get_job(job_id: JobId, impl: Impl) -> JobObject:
    return JobObject.of(impl.status(job_id))


@router.post("/{job_id}/cancel", summary="Cancel a job", responses=error_answers(404, 409))
def cancel_job(job_id: JobId, impl: Impl) -> JobObject:
    """A job that is not running is cancelled at once; a running one has `trl.wanted` set until its trainer ends."""
    return JobObject.of(impl.cancel(job_id))


@router.post("/{job_id}/pause", summary="Pause a job", responses=error_answers(404, 409))
def pause_job(job_id: JobId, impl: Impl) -> JobObject:
    """Stop after a checkpoint and give the device back; `resume` continues from it."""
    return JobObject.of(impl.pause(job_id))


@router.post("/{job_id}/resume", summary="Resume a job", responses=error_answers(404, 409))
def resume_job(job_id: JobId, impl: Impl) -> JobObject:
    """Queue a paused job again."""
    return JobObject.of(impl.resume(job_id))


@router.get("/{job_id}/events", summary="List a job's events", responses=error_answers(400, 404))
def list_events(
    job_id: JobId,
    impl: Impl,
    after: After = None,
    limit: Limit = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="desc: newest first.")] = "desc",
) -> ListOf[EventObject]:
    """The job's whole history: states, messages, metrics, evaluations, checkpoints."""
    page = impl.events(job_id, after=after, limit=limit, order=order)
    return page_of(page, [EventObject.of(event) for event in page.data])


@router.get("/{job_id}/checkpoints", summary="List a job's checkpoints", responses=error_answers(400, 404))
def list_checkpoints(job_id: JobId, impl: Impl, after: After = None, limit: Limit = 10) -> ListOf[CheckpointObject]:
    """Complete checkpoints, newest first."""
    page = impl.artifacts(job_id, after=after, limit=limit)
    name = impl.status(job_id).fine_tuned_model or job_id
    return page_of(page, [CheckpointObject.of(checkpoint, name) for checkpoint in page.data])


def _metadata_filter(request: Request) -> dict[str, str]:
    pairs = {}
    for key, value in request.query_params.items():
        if key.startswith("metadata"):
            match = _METADATA_KEY.fullmatch(key)
            if match is None:
                raise InvalidRequest(
                    f"{key!r} is not a metadata filter: write metadata[KEY]=VALUE, with a key of 1 to 64 characters.",
                    param="metadata",
                )
            pairs[match[1]] = value
    return pairs
