"""Who is answered: one guard around every route there is, FastAPI's and BentoML's alike.

With API keys set, a request must carry one, as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY`` (a gateway may
take the first header for itself). Its name, never the key, is the caller's in ``scope["state"]["caller"]`` and on
log lines. Without keys only callers on this host are answered, and of those not the web pages in its browser: their
Host or Origin names another site (DNS rebinding, cross-site requests).
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
# The API's description, which says how to send a key and holds nothing of this service's own: a browser cannot be
# told to send one with a page.
DOCUMENT_PATHS = frozenset({"/docs", "/redoc", "/openapi.json"})


class AccessGuard:
    """Pure ASGI, so that it adds no task and no buffer to a request."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._allow_anonymous = settings.allow_anonymous
        self._origins = frozenset(settings.cors_origins)
        self._keys = tuple((key.name, _digest(key.secret.get_secret_value())) for key in settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await WebSocketClose()(scope, receive, send)  # none are served here
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        caller = self._caller(headers)
        refusal = self._refusal(scope, headers, caller)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        if caller is None:
            await self._app(scope, receive, send)
            return
        with structlog.contextvars.bound_contextvars(caller=caller):
            await self._app(scope, receive, send)

    def _caller(self, headers: Headers) -> str | None:
        """The name of the key that the request carries; None when it carries none that is known."""
        # Digests, all of them, compared in constant time: how long it takes says nothing about the keys.
        given = [_digest(key) for key in _given_keys(headers)]
        names = [name for key in given for name, known in self._keys if hmac.compare_digest(key, known)]
        return names[0] if names else None

    def _refusal(self, scope: Scope, headers: Headers, caller: str | None) -> Response | None:
        if "pickle" in headers.get("content-type", "").lower():
            return error_response(
                415, "Pickled bodies are never read, since unpickling runs code: send JSON.", code="pickle_refused"
            )
        if scope["path"] in OPEN_PATHS:
            return None
        if self._keys and scope["path"] in DOCUMENT_PATHS:
            return None
        refusal = _check_key(headers, caller) if self._keys else self._check_local(scope, headers)
        if refusal is not None:
            client = scope.get("client")
            log.info("access.refused", status=refusal.status_code, path=scope["path"], client=client and client[0])
        return refusal

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
        if origin is not None and origin.lower() not in self._origins and not _is_loopback(_hostname(origin)):
            return error_response(
                403,
                f"The request comes from a web page of {origin!r}, which is not among TRL_CORS_ORIGINS. {advice}",
                code="foreign_origin",
            )
        return None


def _check_key(headers: Headers, caller: str | None) -> Response | None:
    if caller is not None:
        return None
    given = _given_keys(headers)
    problem = "is not one that this service accepts" if given else "is missing"
    return error_response(
        401,
        f"The API key {problem}: send one of TRL_API_KEYS as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.",
        code="invalid_api_key" if given else "missing_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def _given_keys(headers: Headers) -> list[str]:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return [key for key in (headers.get("x-api-key"), bearer) if key]


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
