"""What is done to every request before any route sees it: its id, and bounds on its body."""

import re
import secrets
import time

import structlog
from anyio import move_on_after
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bento_service.api.errors import error_response
from bento_service.settings import Settings

REQUEST_ID = "x-request-id"
MAX_JSON_BYTES = 1 << 20
# A multipart upload is its file and the form around it.
FORM_BYTES = 64 * 1024
UPLOAD_PATH = "/v1/files"
# The deepest request body has six; what reads JSON is recursive and has its end somewhere past a hundred.
MAX_JSON_DEPTH = 32

# The rest of the body will not be read, so the connection cannot carry another request.
_CLOSE = {"connection": "close"}

_JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_JSON_STRUCTURE = re.compile(rb"[\[\]{}]")
# PostgreSQL's texts hold none.
_JSON_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")

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


class Bodies:
    """Takes in every body: within its size, in time, and if it is JSON, neither too deep nor with NUL characters.

    An upload is passed on as it arrives, so that it never lies in memory; any other body is small, and is read whole
    before the app sees the request. Answers 413, 408 and 400.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._max_upload = settings.max_file_bytes + FORM_BYTES
        self._idle_seconds = settings.body_idle_seconds
        self._bytes_per_second = settings.body_bytes_per_second

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        upload = scope["method"] == "POST" and scope["path"].rstrip("/") == UPLOAD_PATH
        limit = self._max_upload if upload else MAX_JSON_BYTES
        declared = headers.get("content-length", "")
        if b"%00" in scope.get("query_string", b""):
            await _bad_request("The query holds a NUL character (%00): leave it out.")(scope, receive, send)
        elif declared.isdecimal() and int(declared) > limit:
            await _too_large(limit, upload)(scope, receive, send)
        elif declared in ("", "0") and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)  # no body
        else:
            arrival = _Arrival(receive, limit, upload, self._idle_seconds, self._bytes_per_second)
            await (self._stream if upload else self._whole)(arrival, scope, receive, send)

    async def _whole(self, arrival: "_Arrival", scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        message = await arrival()
        while message["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
            message = await arrival()
        refusal = arrival.refusal or _json_refusal(body)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if message["type"] != "http.request":
            return  # the caller is gone, and nobody is left to be answered
        pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def read() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, read, send)

    async def _stream(self, arrival: "_Arrival", scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            if arrival.refusal is None or started:
                started = True
                await send(message)

        try:
            await self._app(scope, arrival, watched)
        except Exception:
            if arrival.refusal is None or started:
                raise
        if arrival.refusal is not None and not started:
            await arrival.refusal(scope, receive, send)


class _Arrival:
    """A body's messages, until it is too large or too slow. Then ``refusal`` is set.

    For the app the caller is then gone: it stops reading, and what it says is not sent.
    """

    def __init__(
        self, receive: Receive, limit: int, upload: bool, idle_seconds: float, bytes_per_second: float
    ) -> None:
        self._receive = receive
        self._limit = limit
        self._upload = upload
        self._idle_seconds = idle_seconds
        self._bytes_per_second = bytes_per_second
        self._received = 0
        self._waited = 0.0  # for the caller only, not for what the app does between
        self._complete = False
        self.refusal: Response | None = None

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the caller to go, as long as the answer takes
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        message: Message | None = None
        began = time.monotonic()
        with move_on_after(self._idle_seconds):
            message = await self._receive()
        self._waited += time.monotonic() - began
        if message is None:
            self.refusal = _too_slow(f"nothing of it arrived for {self._idle_seconds:g} seconds")
            return {"type": "http.disconnect"}
        self._received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._received > self._limit:
            self.refusal = _too_large(self._limit, self._upload)
        elif not self._complete and self._waited > self._idle_seconds and self._is_slow():
            self.refusal = _too_slow(f"less than {self._bytes_per_second:g} bytes a second of it arrived")
        return message if self.refusal is None else {"type": "http.disconnect"}

    def _is_slow(self) -> bool:
        return self._received < self._waited * self._bytes_per_second


def _json_refusal(body: bytearray) -> Response | None:
    if body.lstrip()[:1] not in (b"{", b"["):
        return None  # no JSON, or a single value: what reads it says so
    if _is_deep(body):
        return _bad_request(f"The body is nested deeper than {MAX_JSON_DEPTH} levels: no request needs that.")
    if _JSON_NUL.search(body):
        return _bad_request("A text in the body holds a NUL character (\\u0000): leave it out.")
    return None


def _is_deep(body: bytearray) -> bool:
    if body.count(b"{") + body.count(b"[") <= MAX_JSON_DEPTH:
        return False
    depth = 0
    for match in _JSON_STRUCTURE.finditer(_JSON_STRING.sub(b"", body)):
        depth += 1 if match[0] in b"{[" else -1
        if depth > MAX_JSON_DEPTH:
            return True
    return False


def _bad_request(message: str) -> Response:
    return error_response(400, message, code="invalid_request")


def _too_large(limit: int, upload: bool) -> Response:
    setting = " (TRL_MAX_FILE_BYTES on the service)" if upload else ""
    return error_response(
        413,
        f"The body is larger than the {limit} bytes accepted here{setting}: send less.",
        code="too_large",
        headers=_CLOSE,
    )


def _too_slow(reason: str) -> Response:
    return error_response(
        408,
        f"The body arrives too slowly: {reason} (TRL_BODY_IDLE_SECONDS and TRL_BODY_BYTES_PER_SECOND on the service).",
        code="body_too_slow",
        headers=_CLOSE,
    )
