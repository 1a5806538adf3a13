"""What a caller's own request says about who calls and under which trace: the headers that go on to the service."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError

from . import compat
from .config import fits_a_header
from .errors import RequestRefused

# W3C Trace Context and Baggage.
TRACE_HEADERS = ("traceparent", "tracestate", "baggage")

_trace: ContextVar[dict[str, str] | None] = ContextVar("trl_remote_trace", default=None)


class TrlRemoteProviderData(BaseModel):
    """The keys of X-LlamaStack-Provider-Data that are this provider's; others belong to other providers."""

    trl_remote_api_key: SecretStr | None = None


@contextmanager
def traced(headers: dict[str, str | None]) -> Iterator[None]:
    """Within this, requests to the service carry these of the caller's headers."""
    token = _trace.set({name: value for name in TRACE_HEADERS if (value := headers.get(name))})
    try:
        yield
    finally:
        _trace.reset(token)


def trace_headers() -> dict[str, str]:
    """Of the stack's own span where OpenTelemetry records one, else the caller's."""
    headers: dict[str, str] = dict(_trace.get() or {})
    try:
        from opentelemetry import propagate
    except ModuleNotFoundError:
        return headers
    propagate.inject(headers)
    return headers


def api_key() -> SecretStr | None:
    """The key that the caller sent for the service. Raises RequestRefused when no header can hold it."""
    data: dict[str, Any] = compat.provider_data()
    try:
        key = TrlRemoteProviderData.model_validate(data).trl_remote_api_key
    except ValidationError:
        raise _refused() from None  # without the value: it is meant as a secret
    if key is not None and not fits_a_header(key.get_secret_value()):
        raise _refused()
    return key or None


def _refused() -> RequestRefused:
    return RequestRefused(
        "trl_remote_api_key of the provider data header must be a text of printable ASCII without spaces: "
        'X-LlamaStack-Provider-Data: {"trl_remote_api_key": "..."}'
    )
