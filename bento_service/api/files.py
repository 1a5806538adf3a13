"""``/v1/files``: the data to train on."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from bento_service.api.context import NO_NUL, After, FileId, Impl, error_answers
from bento_service.api.downloads import Asked, download, download_answers
from bento_service.api.upload import UploadForm
from bento_service.api.wire import FileDeleted, FileObject, ListOf, page_of
from bento_service.errors import InvalidRequest
from bento_service.post_training import PURPOSE, require_purpose

router = APIRouter(prefix="/v1/files", tags=["Files"])

# The route reads its body itself, as a stream, so FastAPI cannot derive this.
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSON Lines, a JSON array, CSV or Parquet, each also gzipped.",
                        },
                        "purpose": {
                            "type": "string",
                            "enum": [PURPOSE],
                            "default": PURPOSE,
                            "description": "The one that there is.",
                        },
                    },
                }
            }
        },
    }
}


@router.post("", summary="Upload a file", responses=error_answers(400, 408, 413, 503), openapi_extra=_FORM)
async def upload_file(request: Request, impl: Impl) -> FileObject:
    """Store a data file. It is on disk when this answers; its rows are checked when a job is submitted."""
    with (
        request.app.state.uploads.place(impl.settings.max_uploads),
        await to_thread.run_sync(impl.receive_file) as incoming,
    ):
        form = UploadForm(request.headers.get("content-type", ""), incoming)
        await form.read(request.stream())
        purpose = _purpose(form.fields)
        assert form.filename is not None  # read() raises without one
        filename = form.filename
        stored = await to_thread.run_sync(lambda: impl.add_file(incoming, filename=filename, purpose=purpose))
    return FileObject.of(stored)


def _purpose(fields: Mapping[str, str]) -> str:
    """Raises InvalidRequest for a field that has no meaning here, and for another purpose."""
    for name in fields:
        if name.startswith("expires_after"):
            raise InvalidRequest(
                "Files do not expire here: leave expires_after out, and delete the file when it is no longer needed.",
                param="expires_after",
            )
        if name != "purpose":
            raise InvalidRequest(
                f"The form has an unknown field {name[:64]!r}: send file and purpose.", param=name[:64]
            )
    purpose = fields.get("purpose", PURPOSE)
    require_purpose(purpose)
    return purpose


@router.get("", summary="List files", responses=error_answers(400, 404))
def list_files(
    impl: Impl,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Entries in a page.")] = 10_000,
    order: Annotated[Literal["asc", "desc"], Query(description="By age; desc: newest first.")] = "desc",
    purpose: Annotated[
        str | None, Query(max_length=64, pattern=NO_NUL, description="Only files of this purpose.")
    ] = None,
    sha256: Annotated[
        str | None,
        Query(pattern="^[0-9a-f]{64}$", description="Only files with these bytes: they need no second upload."),
    ] = None,
) -> ListOf[FileObject]:
    """Data files, and the metrics of jobs that have succeeded, whose purpose is fine-tune-results."""
    page = impl.list_files(after=after, limit=limit, purpose=purpose, order=order, sha256=sha256)
    return page_of(page, [FileObject.of(file) for file in page.data])


@router.get("/{file_id}", summary="Describe a file", responses=error_answers(404))
def get_file(file_id: FileId, impl: Impl) -> FileObject:
    return FileObject.of(impl.get_file(file_id))


@router.delete("/{file_id}", summary="Delete a file", responses=error_answers(404, 409))
def delete_file(file_id: FileId, impl: Impl) -> FileDeleted:
    """Refused with 409 while a job that has not ended uses the file."""
    impl.delete_file(file_id)
    return FileDeleted(id=file_id)


@router.get(
    "/{file_id}/content",
    summary="Download a file",
    response_class=StreamingResponse,
    responses=error_answers(400, 404, 416) | download_answers(),
)
def get_file_content(file_id: FileId, impl: Impl, asked: Asked) -> Response:
    """The bytes as they were uploaded; ranges are supported. The `ETag` is their SHA-256."""
    content = impl.file_content(file_id)
    return download(asked, filename=content.name, size=content.size, etag=content.sha256, read=content.read)
