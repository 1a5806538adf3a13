"""What a job has made: its checkpoints as downloads that can go on where they were cut off, and its manifest."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import FileResponse, StreamingResponse

from bento_service.api.context import Impl, JobId, error_answers
from bento_service.api.errors import error_response
from bento_service.training.manifest import RunManifest

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Artifacts"])

Step = Annotated[int, Path(ge=0, lt=2**31, description="Optimizer step of the checkpoint, as the list has it.")]

_RANGE = re.compile(r"bytes=(\d{0,20})-(\d{0,20})")
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_PART = "The part that `range` asked for."


@router.get(
    "/{job_id}/checkpoints/{step}/content",
    summary="Download a checkpoint",
    response_class=StreamingResponse,
    responses=error_answers(400, 404, 416, 425)
    | {
        200: {"content": {"application/x-tar": _BINARY}},
        206: {"content": {"application/x-tar": _BINARY}, "description": _PART},
    },
)
def get_checkpoint_content(
    job_id: JobId,
    step: Step,
    impl: Impl,
    range: Annotated[str | None, Header(description="One range of bytes; several are answered in full.")] = None,
    if_range: Annotated[str | None, Header(description="ETag of a download to go on with.")] = None,
) -> Response:
    """A tar of what a user of the model needs: weights as safetensors, configuration, tokenizer, chat template, model
    card, and `manifest.json` with the SHA-256 of each file. Not what only resuming needs: optimizer and random state.

    The same checkpoint is the same bytes every time. To go on with a download that was cut off, send `Range` with
    the bytes that are missing and `If-Range` with the `ETag` of the first answer.
    """
    archive = impl.checkpoint(job_id, step)
    size, etag = archive.size, f'"{archive.etag}"'
    headers = {
        "accept-ranges": "bytes",
        "etag": etag,
        "content-disposition": f'attachment; filename="{archive.name}"',
        "x-content-type-options": "nosniff",
    }
    start, stop, status = 0, size, 200
    if range is not None and (if_range is None or if_range == etag):
        wanted = requested_range(range, size)
        if wanted is not None:
            start, stop = wanted
            if start >= stop:
                message = f"The range {range!r} is not in the {size} bytes of the checkpoint."
                return error_response(
                    416,
                    message,
                    code="range_not_satisfiable",
                    param="range",
                    headers={"content-range": f"bytes */{size}"},
                )
            status = 206
            headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["content-length"] = str(stop - start)
    return StreamingResponse(archive.read(start, stop), status, headers, media_type="application/x-tar")


@router.get(
    "/{job_id}/checkpoints/{step}/files/{name}",
    summary="Download one file of a checkpoint",
    response_class=FileResponse,
    responses=error_answers(400, 404, 425)
    | {
        200: {"content": {"application/octet-stream": _BINARY}},
        206: {"content": {"application/octet-stream": _BINARY}, "description": _PART},
    },
)
def get_checkpoint_file(
    job_id: JobId,
    step: Step,
    name: Annotated[str, Path(max_length=255, description="As `manifest.json` has it.")],
    impl: Impl,
) -> FileResponse:
    """One of the files that the tar has; ranges are supported. The `ETag` is the file's SHA-256."""
    member = impl.checkpoint(job_id, step).member(name)
    headers = {"x-content-type-options": "nosniff"}
    if member.sha256 is not None:
        headers["etag"] = f'"{member.sha256}"'
    return FileResponse(member.path, filename=member.name, media_type="application/octet-stream", headers=headers)


@router.get("/{job_id}/manifest", summary="Read a job's manifest", responses=error_answers(404))
def get_manifest(job_id: JobId, impl: Impl) -> RunManifest:
    """Of a job that has succeeded: versions, resolved settings, seed, data, hardware, metrics, and its final files."""
    return impl.manifest(job_id)


def requested_range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last that a Range header asks for; an empty range when there is none such.

    None for a header that is not one range of bytes: it is to be ignored (RFC 9110, 14.2).
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:  # the last so many bytes
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    start = int(first)
    return (start, min(int(last) + 1, size)) if last else (start, size)
