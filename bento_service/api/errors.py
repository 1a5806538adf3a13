"""Errors as HTTP answers: status codes, and the body that OpenAI's API has.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

An InvalidDataset adds the report of the file (``DatasetReport.to_json``).
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bento_service.api.dataset_report import DatasetReportBody
from bento_service.errors import (
    Conflict,
    Forbidden,
    InvalidDataset,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    TooLarge,
    TooManyJobs,
    TrlRemoteError,
)

log = structlog.get_logger("bento_service.api")

# The first class that an error is an instance of decides.
_STATUS: tuple[tuple[type[TrlRemoteError], int], ...] = (
    (TooLarge, 413),
    (InvalidRequest, 400),
    (NotFound, 404),
    (NotReady, 425),
    (Conflict, 409),
    (Forbidden, 403),
    (TooManyJobs, 429),
    (Overloaded, 503),
)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}

# What the clients of OpenAI's API read to decide whether to send a request again: none of these heals by itself.
NO_RETRY = {"x-should-retry": "false"}


# What a caller is told to wait when the service is overloaded, or what was asked for is not ready.
RETRY_AFTER_SECONDS = 5
# Until a job has ended; the longest that OpenAI's client waits.
JOB_RETRY_AFTER_SECONDS = 60


class ErrorDetail(BaseModel):
    message: str = Field(description="What happened, to what, and what to do.")
    type: str = Field(
        description="invalid_request_error, authentication_error, permission_error, not_found_error, "
        "conflict_error, rate_limit_error or server_error."
    )
    param: str | None = Field(default=None, description="The field of the request it is about, as a dotted path.")
    code: str | None = Field(default=None, description="Stable, machine-readable.")


class DatasetErrorDetail(ErrorDetail, DatasetReportBody):
    """With code invalid_dataset: the error, and the report of the file."""


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail | DatasetErrorDetail


def error_response(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code, **more}}
    return JSONResponse(body, status, headers=dict(headers or {}))


def status_of(error: TrlRemoteError) -> int:
    """The HTTP status code of a domain error."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def answer(error: TrlRemoteError) -> JSONResponse:
    """A domain error as a response."""
    status = status_of(error)
    more: dict[str, Any] = {}
    if isinstance(error, InvalidDataset) and error.report is not None:
        more = error.report.to_json()
    headers = NO_RETRY if isinstance(error, Conflict) else None
    if isinstance(error, Overloaded | NotReady):
        headers = {"retry-after": str(RETRY_AFTER_SECONDS)}
    elif isinstance(error, TooManyJobs):
        headers = {"retry-after": str(JOB_RETRY_AFTER_SECONDS)}
    return error_response(status, error.message, code=error.code, param=error.param, headers=headers, **more)


def install_error_handlers(app: FastAPI) -> None:
    """Every error of the app's routes answered in the shape above."""

    @app.exception_handler(TrlRemoteError)
    async def _domain(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, TrlRemoteError)
        if status_of(error) >= 500:
            log.error("request.failed", code=error.code, exc_info=error)
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        # loc starts with where the value came from: "body", "query", "path".
        problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
        model = _body_model(request) if error.errors()[0]["loc"][0] == "body" else None
        message, param = describe(problems, model)
        return error_response(400, message, code="invalid_request", param=param)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(error.status_code)
        return error_response(error.status_code, str(error.detail), code=code, headers=error.headers)

    app.add_middleware(UnexpectedErrors)


class UnexpectedErrors:
    """Answers 500 to an exception that nothing else caught; its traceback goes to the log and nowhere else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            # In the middle of its body; there is nobody to answer.
            log.info("request.abandoned", method=scope["method"], path=scope["path"])
        except Exception as error:
            log.error("request.crashed", method=scope["method"], path=scope["path"], exc_info=error)
            if started:
                raise
            response = error_response(
                500,
                "The service failed while it answered; its log has the cause under this request's x-request-id.",
                code="internal_error",
            )
            await response(scope, receive, send)


def describe(problems: Sequence[Mapping[str, Any]], model: type[BaseModel] | None) -> tuple[str, str | None]:
    """pydantic's errors as one message and the first one's field, as a dotted path.

    ``model`` is the model that was validated: the known names that an unknown key is compared with.
    """
    lines: dict[str, str] = {}  # by path: of a union's several complaints about one value the first is enough
    for problem in problems:
        path = "" if problem["type"] == "json_invalid" else _path(problem["loc"], model)
        lines.setdefault(path, _sentence(problem, path, model))
    return "; ".join(lines.values()), next(iter(lines)) or None


def _sentence(problem: Mapping[str, Any], path: str, model: type[BaseModel] | None) -> str:
    kind = problem["type"]
    if kind == "extra_forbidden":
        *parents, key = problem["loc"]
        known = list(_fields_at(model, parents))
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here are {', '.join(sorted(known))}"
        where = f" in {'.'.join(map(str, parents))}" if parents else ""
        return f"unknown key {key!r}{where}: {hint}"
    if kind == "json_invalid":
        return f"the body is not valid JSON: {problem['ctx']['error']} at character {problem['loc'][0]}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def _path(location: Sequence[Any], model: type[BaseModel] | None) -> str:
    """The location without the names that pydantic adds for the members of a union."""
    if model is None:
        return ".".join(str(part) for part in location)
    kept: list[str] = []
    for number, part in enumerate(location, start=1):
        known = _fields_at(model, kept)
        unknown_key = number == len(location)  # the one part that is named though no model has it
        if part not in known and not unknown_key if known else not isinstance(part, int):
            break
        kept.append(str(part))
    return ".".join(kept)


def _fields_at(model: type[BaseModel] | None, path: Sequence[Any]) -> Mapping[str, Any]:
    """Fields of the model that lies at a path of field names; none where there is no model."""
    for name in path:
        field = None if model is None else model.model_fields.get(str(name))
        model = None if field is None else _model_in(field.annotation)
    return {} if model is None else model.model_fields


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _body_model(request: Request) -> type[BaseModel] | None:
    route = request.scope.get("route")
    field = getattr(route, "body_field", None)
    return None if field is None else _model_in(field.field_info.annotation)
