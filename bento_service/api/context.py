"""What every route needs: the core object of this app, valid ids, page sizes, and the answers they document."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Path, Query, Request
from pydantic import AfterValidator

from bento_service.api.errors import ErrorBody
from bento_service.api.wire.base import NO_NUL
from bento_service.errors import NotFound
from bento_service.post_training import TrlPostTrainingImpl

_ID_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


# Async although it does not wait: FastAPI sends all others through its thread pool.
async def _impl(request: Request) -> TrlPostTrainingImpl:
    impl = request.app.state.impl
    assert isinstance(impl, TrlPostTrainingImpl)
    return impl


async def _caller(request: Request) -> str | None:
    name = getattr(request.state, "caller", None)
    assert name is None or isinstance(name, str)
    return name


def _id(kind: str, value: str) -> str:
    # Ids of another form cannot exist; saying so here keeps odd strings away from everything below.
    if not 1 <= len(value) <= 64 or not _ID_CHARACTERS.issuperset(value):
        raise NotFound(f"No {kind} {value[:64]!r}.")
    return value


async def read[T](impl: TrlPostTrainingImpl, call: Callable[[], T], limiter: CapacityLimiter | None = None) -> T:
    """A short read of the store: in this thread where it is local, since the way to another costs more than it."""
    return call() if impl.reads_at_once else await to_thread.run_sync(call, limiter=limiter)


Impl = Annotated[TrlPostTrainingImpl, Depends(_impl)]
# The name of the caller's API key; None where there are no keys.
Caller = Annotated[str | None, Depends(_caller)]
# Validators and not dependencies, each of which costs every request a tenth of a millisecond.
_ID_SCHEMA: dict[str, Any] = {"pattern": "^[A-Za-z0-9_-]{1,64}$"}
FileId = Annotated[
    str,
    AfterValidator(partial(_id, "file")),
    Path(description="As `POST /v1/files` answered it.", json_schema_extra=_ID_SCHEMA),
]
JobId = Annotated[
    str,
    AfterValidator(partial(_id, "fine-tuning job")),
    Path(description="As `POST /v1/fine_tuning/jobs` answered it.", json_schema_extra=_ID_SCHEMA),
]
After = Annotated[
    str | None,
    Query(
        max_length=64,
        pattern=NO_NUL,
        description="Id of the last entry of the page before; absent for the first page.",
    ),
]
Limit = Annotated[int, Query(ge=1, le=100, description="Entries in a page.")]

_DESCRIPTIONS = {
    400: "The request cannot be accepted; `param` names the field, `message` says what to do.",
    401: "API keys are set on the service, and the request has none of them.",
    403: "No API keys are set on the service, and the caller is not on its host.",
    404: "No such file, job or list entry.",
    408: "The body arrives too slowly.",
    409: "The request contradicts what is stored; sending it again does not help.",
    413: "The body is larger than the service accepts.",
    415: "The body is of a type that the service does not read.",
    416: "The range starts after the end; `content-range` has the size.",
    429: "As many jobs as are allowed have not ended; `retry-after` says when to try again (seconds).",
    425: "It is still being written; `retry-after` says when to ask again (seconds).",
    503: "The service has no room for this now; `retry-after` says when to try again (seconds).",
    500: "The service failed; its log has the cause under `x-request-id`.",
}


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's ``responses``: these errors, and those that any route can give."""
    return {
        status: {"model": ErrorBody, "description": _DESCRIPTIONS[status]} for status in (*statuses, 401, 403, 500)
    }
