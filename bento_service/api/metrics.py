"""Prometheus metrics at ``/metrics``: requests by route template, jobs by state.

A label is never a path or an id, so that the number of series stays that of the routes and states.
"""

import time

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

router = APIRouter(tags=["service"])

# Seconds; a status takes milliseconds, an upload minutes.
_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30, 120, 600)

# The label of a request that no route of ours took.
_NO_ROUTE = "none"


class Metrics:
    """The series of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "trl_http_requests",
            "HTTP requests answered, by method, route template and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "trl_http_request_seconds",
            "Time from a request's arrival to the start of its answer, by method and route template.",
            ["method", "route"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.jobs = Gauge("trl_jobs", "Jobs in the store, by state.", ["status"], registry=self.registry)


class MeasuredRequests:
    """Pure ASGI, around the router that puts the route it chose into the scope."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", _NO_ROUTE)
                method = scope["method"] if route != _NO_ROUTE else "any"
                self._metrics.requests.labels(method, route, str(message["status"])).inc()
                self._metrics.seconds.labels(method, route).observe(time.perf_counter() - began)
            await send(message)

        await self._app(scope, receive, measured)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus's text format."}},
)
async def metrics(request: Request) -> Response:
    """Requests by route template, and jobs by state, in Prometheus's text format."""
    series: Metrics = request.app.state.metrics
    for status, count in (await run_in_threadpool(request.app.state.impl.count_jobs)).items():
        series.jobs.labels(status.value).set(count)
    return Response(generate_latest(series.registry), media_type=CONTENT_TYPE_LATEST)
