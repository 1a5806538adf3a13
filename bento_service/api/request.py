"""What is done to every request before any route sees it: its id, and a bound on its body."""

import re
import secrets

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bento_service.api.errors import error_response

REQUEST_ID = "x-request-id"
MAX_JSON_BYTES = 1 << 20
# A multipart upload is its file and the form around it.
FORM_BYTES = 64 * 1024
UPLOAD_PATH = "/v1/files"

_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestIds:
    """Puts ``x-request-id`` on every response and every log line: the caller's, or one made here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _GIVEN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._app(scope, receive, with_id)


class BodyLimit:
    """Answers 413 to a body over its limit: at once when Content-Length says so, else as soon as it is passed."""

    def __init__(self, app: ASGIApp, max_file_bytes: int) -> None:
        self._app = app
        self._max_upload = max_file_bytes + FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        upload = scope["method"] == "POST" and scope["path"].rstrip("/") == UPLOAD_PATH
        limit = self._max_upload if upload else MAX_JSON_BYTES
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            await _too_large(limit, upload)(scope, receive, send)
            return

        received = 0
        started = False

        async def counted() -> Message:
            nonlocal received
            if received > limit:
                return {"type": "http.disconnect"}
            message = await receive()
            received += len(message.get("body", b""))
            # For the app below, the caller is gone: it stops reading, and what it then says is not sent.
            return {"type": "http.disconnect"} if received > limit else message

        async def watched(message: Message) -> None:
            nonlocal started
            if received <= limit or started:
                started = True
                await send(message)

        try:
            await self._app(scope, counted, watched)
        except Exception:
            if received <= limit or started:
                raise
        if received > limit and not started:
            await _too_large(limit, upload)(scope, receive, send)


def _too_large(limit: int, upload: bool) -> Response:
    setting = " (TRL_MAX_FILE_BYTES on the service)" if upload else ""
    return error_response(
        413, f"The body is larger than the {limit} bytes accepted here{setting}: send less.", code="too_large"
    )
