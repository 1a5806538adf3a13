"""The HTTP application, and what stands in front of it."""

from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bento_service import __version__
from bento_service.api import artifacts, files, fine_tuning, health, imports, metrics, models, validation
from bento_service.api.access import OPEN_PATHS, AccessGuard
from bento_service.api.errors import error_response, install_error_handlers
from bento_service.api.event_stream import EventStreams
from bento_service.api.head import HeadRequests
from bento_service.api.request import REQUEST_ID, Bodies, RequestIds
from bento_service.api.upload import Uploads
from bento_service.post_training import TrlPostTrainingImpl
from bento_service.settings import Settings

DESCRIPTION = """\
Trains models on preference data with TRL. The shape is that of OpenAI's fine-tuning API, so its clients work;
what that API has no place for is in the `trl` object of requests and answers. Times are unix seconds.
"""


def create_app(impl: TrlPostTrainingImpl | None = None) -> FastAPI:
    """The routes. ``app.state.impl`` may also be set later, before the first request."""
    app = FastAPI(title="TRL Remote Training Service", version=__version__, description=DESCRIPTION)
    app.state.impl = impl
    app.state.streams = EventStreams()
    app.state.uploads = Uploads()
    app.state.metrics = metrics.Metrics()
    app.add_middleware(metrics.MeasuredRequests, metrics=app.state.metrics)
    for module in (fine_tuning, validation, artifacts, imports, files, models, health, metrics):
        app.include_router(module.router)
    app.router.routes.append(Route("/v1/{path:path}", _NoRoute(), include_in_schema=False))
    install_error_handlers(app)
    app.add_middleware(HeadRequests)
    generate = app.openapi
    app.openapi = lambda: _with_keys(_without_422(generate()))  # type: ignore[method-assign]
    return app


def in_front_of(app: ASGIApp, settings: Settings) -> ASGIApp:
    """The app behind a request id, CORS, the access guard and bounds on bodies; the first meets a request first."""
    guarded: ASGIApp = AccessGuard(Bodies(app, settings), settings)
    if settings.cors_origins:
        # Before the guard: a browser asks without a key whether it may ask with one.
        guarded = CORSMiddleware(
            guarded,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("content-disposition", "content-range", "etag", "retry-after", REQUEST_ID),
        )
    return RequestIds(guarded)


_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class _NoRoute:
    """Under /v1 a path or method that there is not, answered as every other error. A class, to match any method."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        others = scope["app"].router.routes[:-1]
        allowed = [
            method
            for method in _METHODS
            # HEAD is answered wherever GET is.
            if any(
                route.matches({**scope, "method": "GET" if method == "HEAD" else method})[0] is Match.FULL
                for route in others
            )
        ]
        asked = f"{scope['method']} {scope['path']}"
        answer = error_response(404, f"There is no {asked}; see /docs.", code="not_found")
        if allowed:
            allow = ", ".join(allowed)
            message = f"{asked} is not supported, only {allow}; see /docs."
            answer = error_response(405, message, code="method_not_allowed", headers={"allow": allow})
        await answer(scope, receive, send)


def _without_422(document: dict[str, Any]) -> dict[str, Any]:
    """FastAPI documents its own 422 for every route with parameters; here those errors are 400."""
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document


def _with_keys(document: dict[str, Any]) -> dict[str, Any]:
    """How to send an API key. Nowhere required, since a service may have none set."""
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "One of the service's TRL_API_KEYS."},
        "header": {
            "type": "apiKey",
            "in": "header",
            "name": "X-API-Key",
            "description": "The same key, where a gateway takes the Authorization header for itself.",
        },
    }
    document["security"] = [{"bearer": []}, {"header": []}, {}]
    for path in OPEN_PATHS.intersection(document["paths"]):
        for operation in document["paths"][path].values():
            operation["security"] = []
    return document
