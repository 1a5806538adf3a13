"""``POST /v1/files/import``: a file made from a URL."""

from functools import partial

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import Field

from bento_service.api.context import Impl, error_answers
from bento_service.api.upload import Uploads
from bento_service.api.wire import FileObject, Strict
from bento_service.post_training import PURPOSE

router = APIRouter(prefix="/v1/files", tags=["Files"])


class ImportFile(Strict):
    """A file to be made from what a URL answers."""

    url: str = Field(
        min_length=1,
        description="https://..., http://... or huggingface://datasets/<org>/<name>/<path>, in a place that the "
        "operator allows.",
        examples=["https://data.example.org/pairs.jsonl"],
    )
    purpose: str = Field(default=PURPOSE, max_length=64, description="As for an upload.")
    filename: str | None = Field(
        default=None, min_length=1, max_length=255, description="Default: the last part of the URL's path."
    )


@router.post("/import", summary="Import a file from a URL", responses=error_answers(400, 408, 413, 503))
async def import_file(request: Request, body: ImportFile, impl: Impl) -> FileObject:
    """Read a URL and store what it answers, as an upload would be; it is on disk when this answers.

    403 with the code `import_refused` where the operator does not allow the URL (`TRL_IMPORT_URLS`), or it leads to a
    private address. Redirects are followed to allowed places only; no credentials are sent.
    """
    uploads: Uploads = request.app.state.uploads
    download = partial(impl.import_file, body.url, filename=body.filename, purpose=body.purpose)
    with uploads.place(impl.settings.max_uploads):
        return FileObject.of(await to_thread.run_sync(download, limiter=uploads.importers))
