"""``/health``: whether the service works, and how busy it is."""

from typing import Any

import structlog
from fastapi import APIRouter
from fastapi.responses import JSONResponse

from bento_service import __version__
from bento_service.api.context import Impl
from bento_service.api.wire import Health
from bento_service.errors import Overloaded

log = structlog.get_logger("bento_service.api")

router = APIRouter(tags=["Service"])

_UNHEALTHY: dict[int | str, dict[str, Any]] = {
    503: {"model": Health, "description": "The database does not answer; the log says why."}
}


@router.get("/health", summary="Health", response_model=Health, responses=_UNHEALTHY)
def health(impl: Impl) -> Health | JSONResponse:
    """Open to all callers, also when API keys are set."""
    devices = impl.devices
    try:
        counts = impl.count_jobs()
    except Overloaded as error:
        log.error("health.store_unavailable", exc_info=error)
        body = Health(status="unhealthy", version=__version__, device=devices.kind, slots=devices.count, queue={})
        return JSONResponse(body.model_dump(), 503)
    return Health(status="healthy", version=__version__, device=devices.kind, slots=devices.count, queue=counts)
