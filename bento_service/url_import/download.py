"""Downloading an allowed URL into a file of the service."""

import time
from collections.abc import Sequence
from functools import cached_property
from ssl import SSLContext

import httpcore
import httpx
import structlog

from bento_service.errors import ImportFailed, ImportRefused, TooLarge
from bento_service.files import IncomingFile
from bento_service.settings import Settings
from bento_service.url_import.addresses import CheckedBackend, Resolve, system_resolve
from bento_service.url_import.allowlist import ImportUrl, UrlPattern

log = structlog.get_logger("bento_service.import")

MAX_REDIRECTS = 5
# A server that sends nothing for this long is given up, the limit of the whole download aside.
SILENT_SECONDS = 30.0
CONNECT_SECONDS = 10.0

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = [
    ("user-agent", "trl-remote"),
    ("accept", "*/*"),
    # What is stored is what the file's owner published.
    ("accept-encoding", "identity"),
]
# The service reads gzipped data, told by its content; other encodings would be stored as rubbish.
_READABLE_ENCODINGS = frozenset({"", "identity", "gzip", "x-gzip"})


class UrlImports:
    """Downloads from the places that the operator allows, and from no others.

    Never through a proxy of the environment: it would look names up itself, after the check.
    """

    def __init__(self, settings: Settings, *, resolve: Resolve = system_resolve) -> None:
        self._patterns: Sequence[UrlPattern] = settings.import_urls
        self._private_hosts = frozenset(settings.import_private_hosts)
        self._seconds = settings.import_seconds
        self._max_bytes = settings.max_file_bytes
        self._resolve = resolve

    @cached_property
    def _tls(self) -> SSLContext:
        # certifi's authorities, or those of SSL_CERT_FILE and SSL_CERT_DIR.
        return httpx.create_ssl_context()

    def download(self, text: str, incoming: IncomingFile) -> str:
        """Write what the URL answers to ``incoming``; returns the file's name, from the URL.

        Raises InvalidRequest for what is no URL, ImportRefused for one that is not allowed, at first or after a
        redirect, ImportFailed when it cannot be read in time, TooLarge.
        """
        self._require_enabled()
        first = url = ImportUrl.parse(text)
        backend = CheckedBackend(self._resolve, self._private_hosts, time.monotonic() + self._seconds)
        for _ in range(MAX_REDIRECTS + 1):
            self._require_allowed(url, first)
            location = self._fetch(url, backend, incoming)
            if location is None:
                log.info("import.done", url=str(url), bytes=incoming.bytes)
                return _filename(first)
            url = url.redirected(location)
        raise ImportFailed(f"{first} redirects more than {MAX_REDIRECTS} times.", param="url")

    def _require_enabled(self) -> None:
        if not self._patterns:
            raise ImportRefused(
                "This service imports no files from URLs. Upload the file with POST /v1/files, or have the operator "
                "allow places in TRL_IMPORT_URLS.",
                param="url",
            )

    def _require_allowed(self, url: ImportUrl, first: ImportUrl) -> None:
        if any(pattern.allows(url) for pattern in self._patterns):
            return
        what = f"{url} is" if url == first else f"{first} redirects to {url}, which is"
        places = ", ".join(map(str, self._patterns))
        raise ImportRefused(
            f"{what} not in a place that this service imports files from ({places}). Upload the file with POST "
            "/v1/files, or have the operator add the place to TRL_IMPORT_URLS.",
            param="url",
        )

    def _fetch(self, url: ImportUrl, backend: CheckedBackend, incoming: IncomingFile) -> str | None:
        """One request. The location of a redirect; None when the file is written."""
        address = httpcore.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.target)
        timeouts = {"connect": CONNECT_SECONDS, "read": SILENT_SECONDS, "write": SILENT_SECONDS}
        host = url.origin.partition("://")[2]
        headers = [("host", host), *_HEADERS]
        try:
            with (
                httpcore.ConnectionPool(ssl_context=self._tls, network_backend=backend, retries=0) as pool,
                pool.stream("GET", address, headers=headers, extensions={"timeout": timeouts}) as response,
            ):
                answered = {name.lower(): value.decode("latin-1") for name, value in response.headers}
                if response.status in _REDIRECTS and b"location" in answered:
                    return answered[b"location"]
                self._require_file(url, response.status, answered)
                for chunk in response.iter_stream():
                    incoming.write(chunk)
                return None
        except httpcore.TimeoutException as error:
            raise ImportFailed(
                f"{url} was not read in time: the limit is {self._seconds:g} seconds in all (TRL_IMPORT_SECONDS on "
                f"the service) and {SILENT_SECONDS:g} without a byte. Try again, or upload the file.",
                param="url",
            ) from error
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            raise ImportFailed(
                f"{url} could not be read: {str(error) or type(error).__name__}. Try again, or upload the file.",
                param="url",
            ) from error

    def _require_file(self, url: ImportUrl, status: int, headers: dict[bytes, str]) -> None:
        if status != 200:
            advice = "credentials are not sent; upload the file" if status in (401, 403) else "check the URL"
            raise ImportFailed(f"{url} answered with status {status}: {advice}.", param="url")
        encoding = headers.get(b"content-encoding", "").strip().lower()
        if encoding not in _READABLE_ENCODINGS:
            raise ImportFailed(f"{url} answers in the encoding {encoding[:20]!r}: upload the file.", param="url")
        length = headers.get(b"content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise TooLarge(
                f"{url} has {length} bytes, and this service accepts {self._max_bytes}: import a smaller file, or "
                "raise TRL_MAX_FILE_BYTES on the service.",
                param="url",
            )


def _filename(url: ImportUrl) -> str:
    name = url.path.rpartition("/")[2]
    return "".join(character for character in name if character.isprintable()) or "import"
