"""Who is answered: one guard around every route there is, FastAPI's and BentoML's alike.

With API keys set, a request must carry one, as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY`` (a gateway may
take the first header for itself). Without keys only callers on this host are answered, and of those not the web
pages in its browser: their Host or Origin names another site (DNS rebinding, cross-site requests).
"""

import hmac
import ipaddress
from hashlib import sha256
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from bento_service.api.errors import error_response
from bento_service.settings import Settings

log = structlog.get_logger("bento_service.access")

# Probes; they say nothing about jobs or data but how many there are.
OPEN_PATHS = frozenset({"/livez", "/readyz", "/healthz", "/health"})


class AccessGuard:
    """Pure ASGI, so that it adds no task and no buffer to a request."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._allow_anonymous = settings.allow_anonymous
        self._keys = tuple((key.name, _digest(key.secret.get_secret_value())) for key in settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        elif scope["type"] != "lifespan":
            await WebSocketClose()(scope, receive, send)  # none are served here
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if "pickle" in headers.get("content-type", "").lower():
            return error_response(
                415, "Pickled bodies are never read, since unpickling runs code: send JSON.", code="pickle_refused"
            )
        if scope["path"] in OPEN_PATHS:
            return None
        refusal = self._check_key(headers) if self._keys else self._check_local(scope, headers)
        if refusal is not None:
            client = scope.get("client")
            log.info("access.refused", status=refusal.status_code, path=scope["path"], client=client and client[0])
        return refusal

    def _check_key(self, headers: Headers) -> Response | None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [key for key in (headers.get("x-api-key"), token.strip() if scheme.lower() == "bearer" else "") if key]
        # Digests, all of them, compared in constant time: how long it takes says nothing about the keys.
        matches = [hmac.compare_digest(_digest(key), known) for key in given for known in self._keys]
        if any(matches):
            return None
        problem = "is not one that this service accepts" if given else "is missing"
        return error_response(
            401,
            f"The API key {problem}: send one of TRL_API_KEYS as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.",
            code="invalid_api_key" if given else "missing_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def _check_local(self, scope: Scope, headers: Headers) -> Response | None:
        if self._allow_anonymous:
            return None
        advice = (
            "No API keys are set on this service, so it answers only callers on its own host. "
            "Set TRL_API_KEYS there (or TRL_ALLOW_ANONYMOUS=true in a network you trust)."
        )
        client = scope.get("client")
        if client is None or not _is_loopback(client[0]):
            return error_response(403, advice, code="remote_caller")
        host = headers.get("host", "")
        if not _is_loopback(_hostname(f"//{host}")):
            return error_response(
                403, f"Host {host!r} is not a name of the loopback device. {advice}", code="foreign_host"
            )
        origin = headers.get("origin")
        if origin is not None and not _is_loopback(_hostname(origin)):
            return error_response(
                403, f"The request comes from a web page of {origin!r}. {advice}", code="foreign_origin"
            )
        return None


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # not a URL at all
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback
