"""Errors of BentoML's own routes, put into the one shape that errors have here.

BentoML answers `Not Found` as text, `{"error": TEXT, "detail": [pydantic's errors]}` for a bad body, and
`[{"error": TEXT}]` for an exception of an endpoint.
"""

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bento_service.api.errors import describe, error_response

_CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "too_large",
    503: "overloaded",
    504: "timeout",
}
# Their own framing does not fit the new body; all others (allow, retry-after) stay.
_FRAMING = {"content-length", "content-type", "transfer-encoding"}


class BentoErrors:
    """Pure ASGI, around BentoML's app: holds back an error until it is complete, and answers it anew."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = bytearray()

        async def watched(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
                return
            if start is None:
                await send(message)
                return
            body.extend(message.get("body", b""))
            if not message.get("more_body", False):
                await self._answer(scope, receive, send, start, bytes(body))

        await self._app(scope, receive, watched)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, start: Message, body: bytes) -> None:
        status = start["status"]
        given = _parsed(body)
        if isinstance(given, dict) and isinstance(given.get("error"), dict):  # FastAPI's, which it mounts
            await send(start)
            await send({"type": "http.response.body", "body": body})
            return
        message, param = _described(given)
        headers = {name: value for name, value in Headers(raw=start["headers"]).items() if name not in _FRAMING}
        asked = f"{scope['method']} {scope['path']}"
        if status == 404 and not message:
            message = f"There is no {asked}; see /docs."
        elif status == 405:
            message = f"{asked} is not supported, only {headers.get('allow', 'others')}; see /docs."
        if not message:
            message = body.decode("utf-8", "replace")[:1000] or f"The service answered {status}; its log says why."
        response = error_response(status, message, code=_CODES.get(status), param=param, headers=headers)
        await response(scope, receive, send)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:  # text
        return None


def _described(given: Any) -> tuple[str, str | None]:
    """Message and field of BentoML's body; empty where it says nothing."""
    if isinstance(given, list) and given:
        given = given[0]
    if not isinstance(given, dict):
        return "", None
    if isinstance(problems := given.get("detail"), list) and problems:
        # Of JSON itself pydantic says all in its own message.
        return describe([problem | {"type": str(problem["type"]).removeprefix("json_")} for problem in problems], None)
    return str(given.get("error", "")), None
