"""``/v1/fine_tuning/jobs``: submit, follow and stop jobs, and read what belongs to them."""

import re
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response

from bento_service.api.context import NO_NUL, After, Caller, Impl, JobId, Limit, error_answers, read
from bento_service.api.event_stream import EventStream
from bento_service.api.wire import (
    AttemptObject,
    CheckpointObject,
    CreateJob,
    EventObject,
    JobObject,
    ListOf,
    LogObject,
    page_of,
)
from bento_service.errors import InvalidRequest

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning"])

ClientId = Annotated[
    str | None, Query(max_length=256, pattern=NO_NUL, description="Only the job with this `trl.client_id`.")
]

_METADATA_KEY = re.compile(r"metadata\[([^\]]{1,64})\]")

_METADATA_FILTER: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
            "description": "`metadata[k]=v`: only jobs that have all these pairs; `metadata=null`: only jobs without.",
        }
    ]
}

# The schema is that of one message.
_EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "required": ["event", "data"],
                    "properties": {
                        "id": {"type": "string", "description": "The event's id, for `Last-Event-ID`."},
                        "event": {"type": "string", "description": "The event's type, and `done` after the last."},
                        "data": {"type": "string", "description": "An event as JSON; `[DONE]` after the last."},
                    },
                }
            }
        }
    }
}


@router.post("", summary="Submit a job", responses=error_answers(400, 408, 409, 413, 429))
def create_job(body: CreateJob, impl: Impl, caller: Caller) -> JobObject:
    """Check the model, the data and the options, and queue the job.

    Whatever cannot be trained on is refused here, and nothing of it is stored; a job that is answered is safe on
    disk. With `trl.client_id`, the same request again answers the same job, and another one under this id 409.
    """
    return JobObject.of(impl.submit(body.to_request(), submitted_by=caller))


@router.get("", summary="List jobs", responses=error_answers(400, 404), openapi_extra=_METADATA_FILTER)
def list_jobs(
    request: Request,
    impl: Impl,
    after: After = None,
    limit: Limit = 20,
    client_id: ClientId = None,
) -> ListOf[JobObject]:
    """Newest first."""
    metadata = _metadata_filter(request)
    page = impl.list_jobs(
        after=after, limit=limit, metadata=metadata, client_id=client_id, without_metadata=metadata is None
    )
    return page_of(page, [JobObject.of(job) for job in page.data])


@router.get("/{job_id}", summary="Describe a job", response_model=JobObject, responses=error_answers(404))
async def get_job(job_id: JobId, impl: Impl) -> Response:
    # Asked by far the most often, so serialized here: FastAPI would first validate the object once more.
    job = JobObject.of(await read(impl, partial(impl.status, job_id)))
    return Response(job.model_dump_json(), media_type="application/json")


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


@router.get(
    "/{job_id}/events",
    summary="List or watch a job's events",
    response_model=ListOf[EventObject],
    responses=error_answers(400, 404, 503) | _EVENT_STREAM,
)
async def list_events(
    request: Request,
    job_id: JobId,
    impl: Impl,
    after: After = None,
    limit: Limit = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="desc: newest first.")] = "desc",
    stream: Annotated[bool, Query(description="Server-sent events, oldest first, until the job ends.")] = False,
    last_event_id: Annotated[
        str | None, Header(max_length=64, description="Of a stream: go on after this event; stronger than `after`.")
    ] = None,
) -> ListOf[EventObject] | EventStream:
    """The job's whole history: states, messages, metrics, evaluations, checkpoints.

    With `stream=true` all of it from the start (or after the event of the header `Last-Event-ID`, or `after`), and
    then what happens, as it happens. Every message has the event's `id`, its type as `event`, and as `data` the
    object that the list has. After a job's last event comes `event: done` with the data `[DONE]`.
    """
    if stream:
        seq = await read(impl, partial(impl.event_seq, job_id, last_event_id or after))
        return EventStream(request.app.state.streams, impl, job_id, after_seq=seq)
    page = await read(impl, partial(impl.events, job_id, after=after, limit=limit, order=order))
    return page_of(page, [EventObject.of(event) for event in page.data])


@router.get("/{job_id}/checkpoints", summary="List a job's checkpoints", responses=error_answers(400, 404))
def list_checkpoints(job_id: JobId, impl: Impl, after: After = None, limit: Limit = 10) -> ListOf[CheckpointObject]:
    """Complete checkpoints, newest first."""
    page = impl.artifacts(job_id, after=after, limit=limit)
    name = impl.status(job_id).fine_tuned_model or job_id
    return page_of(page, [CheckpointObject.of(checkpoint, name) for checkpoint in page.data])


@router.get("/{job_id}/attempts", summary="List a job's attempts", responses=error_answers(404))
def list_attempts(job_id: JobId, impl: Impl) -> ListOf[AttemptObject]:
    """Each launch of the job's trainer, oldest first, all of them."""
    attempts = [AttemptObject.of(attempt) for attempt in impl.attempts(job_id)]
    return ListOf(data=attempts, has_more=False, first_id=None, last_id=None)


@router.get("/{job_id}/logs", summary="Read a job's log", responses=error_answers(400, 404))
def read_log(
    job_id: JobId,
    impl: Impl,
    offset: Annotated[int | None, Query(ge=0, lt=2**63, description="Byte to start at. Default: 0.")] = None,
    tail: Annotated[int | None, Query(ge=1, le=10_000, description="The last so many lines instead.")] = None,
    limit: Annotated[int, Query(ge=16, le=1 << 20, description="Most bytes of the answer's content.")] = 1 << 16,
) -> LogObject:
    """What the trainer wrote to its standard output and error, all attempts in one file.

    Follow it by asking again with `offset` set to the `next_offset` of the answer before.
    """
    if offset is not None and tail is not None:
        raise InvalidRequest("Both offset and tail are given: the first pages, the second ends the log. Give one.")
    return LogObject.of(impl.log(job_id, offset=offset or 0, tail=tail, limit=limit))


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """The pairs that are asked for; None for ``metadata=null``, which asks for jobs without any."""
    pairs: dict[str, str] = {}
    keys = [key for key in request.query_params if key.startswith("metadata")]
    if keys == ["metadata"] and request.query_params["metadata"] == "null":
        return None
    for key, value in request.query_params.items():
        if key.startswith("metadata"):
            match = _METADATA_KEY.fullmatch(key)
            if match is None:
                raise InvalidRequest(
                    f"{key!r} is not a metadata filter: write metadata[KEY]=VALUE, with a key of 1 to 64 characters, "
                    "or metadata=null alone for jobs without metadata.",
                    param="metadata",
                )
            pairs[match[1]] = value
    return pairs
