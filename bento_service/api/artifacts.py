"""What a job has made: its checkpoints as downloads that can go on where they were cut off, and its manifest."""

from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import StreamingResponse

from bento_service.api.context import Impl, JobId, error_answers
from bento_service.api.downloads import Asked, download, download_answers
from bento_service.training.manifest import RunManifest

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Artifacts"])

Step = Annotated[int, Path(ge=0, lt=2**31, description="Optimizer step of the checkpoint, as the list has it.")]


@router.get(
    "/{job_id}/checkpoints/{step}/content",
    summary="Download a checkpoint",
    response_class=StreamingResponse,
    responses=error_answers(400, 404, 416, 425) | download_answers("application/x-tar"),
)
def get_checkpoint_content(job_id: JobId, step: Step, impl: Impl, asked: Asked) -> Response:
    """A tar of what a user of the model needs: weights as safetensors, configuration, tokenizer, chat template, model
    card, and `manifest.json` with the SHA-256 of each file. Not what only resuming needs: optimizer and random state.

    The same checkpoint is the same bytes every time. To go on with a download that was cut off, send `Range` with
    the bytes that are missing and `If-Range` with the `ETag` of the first answer.
    """
    archive = impl.checkpoint(job_id, step)
    return download(
        asked,
        filename=archive.name,
        size=archive.size,
        etag=archive.etag,
        read=archive.read,
        media_type="application/x-tar",
    )


@router.get(
    "/{job_id}/checkpoints/{step}/files/{name}",
    summary="Download one file of a checkpoint",
    response_class=StreamingResponse,
    responses=error_answers(400, 404, 416, 425) | download_answers(),
)
def get_checkpoint_file(
    job_id: JobId,
    step: Step,
    name: Annotated[str, Path(max_length=255, description="As `manifest.json` has it.")],
    impl: Impl,
    asked: Asked,
) -> Response:
    """One of the files that the tar has; ranges are supported. The `ETag` is the file's SHA-256."""
    member = impl.checkpoint(job_id, step).member(name)
    return download(asked, filename=member.name, size=member.size, etag=member.sha256, read=member.read)


@router.get("/{job_id}/manifest", summary="Read a job's manifest", responses=error_answers(404))
def get_manifest(job_id: JobId, impl: Impl) -> RunManifest:
    """Of a job that has succeeded: versions, resolved settings, seed, data, hardware, metrics, and its final files."""
    return impl.manifest(job_id)
