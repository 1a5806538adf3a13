"""``/v1/files``: the data to train on."""

from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

from bento_service.api.context import After, FileId, Impl, Limit, error_answers
from bento_service.api.upload import UploadForm
from bento_service.api.wire import FileDeleted, FileObject, ListOf, page_of
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
                            "description": "JSON Lines: one preference pair a line, with chosen and rejected.",
                        },
                        "purpose": {"type": "string", "enum": [PURPOSE], "default": PURPOSE},
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
        purpose = form.fields.get("purpose", PURPOSE)
        require_purpose(purpose)
        assert form.filename is not None  # read() raises without one
        filename = form.filename
        stored = await to_thread.run_sync(lambda: impl.add_file(incoming, filename=filename, purpose=purpose))
    return FileObject.of(stored)


@router.get("", summary="List files", responses=error_answers(400, 404))
def list_files(impl: Impl, after: After = None, limit: Limit = 20, purpose: str | None = None) -> ListOf[FileObject]:
    """Newest first."""
    page = impl.list_files(after=after, limit=limit, purpose=purpose)
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
    response_class=FileResponse,
    responses=error_answers(404) | {200: {"content": {"application/octet-stream": {}}}},
)
def get_file_content(file_id: FileId, impl: Impl) -> FileResponse:
    """The bytes as they were uploaded; ranges are supported."""
    file = impl.get_file(file_id)
    return FileResponse(
        impl.file_content(file_id),
        filename=file.filename,
        media_type="application/octet-stream",
        headers={"x-content-type-options": "nosniff"},
    )
