"""Which URLs files may be imported from: the operator's patterns, and a caller's URL held against them."""

from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, unquote

import httpx

from bento_service.errors import InvalidRequest

MAX_URL = 2048
_PORTS = {"https": 443, "http": 80}
_HUB_SCHEMES = ("huggingface://", "hf://")


@dataclass(frozen=True, kw_only=True)
class ImportUrl:
    """A URL in parts, of which the connection, the request and every check are made: it is parsed once."""

    scheme: str  # https or http
    host: str  # lower case; international names as xn--; an IPv6 address without brackets
    port: int
    target: str  # path and query as they are sent
    path: str  # percent-decoded

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises InvalidRequest, which says what about the URL cannot be taken."""
        if len(text) > MAX_URL:
            raise _refused(f"the URL is longer than {MAX_URL} characters")
        return cls._from(_parsed(_hub_url(text)))

    def redirected(self, location: str) -> "ImportUrl":
        """Where a Location header leads. Raises InvalidRequest as ``parse`` does."""
        if len(location) > MAX_URL * 4:  # hubs sign theirs
            raise _refused("it redirects to a URL that is too long")
        base = _parsed(f"{self.origin}{self.target}")
        try:
            return self._from(base.join(location))
        except httpx.InvalidURL as error:
            raise _refused(f"it redirects to something that is not a URL: {error}") from error

    @classmethod
    def _from(cls, url: httpx.URL) -> Self:
        if url.scheme not in _PORTS:
            raise _refused(f"scheme {url.scheme[:20]!r} is not read: use https, http or huggingface://datasets/...")
        if url.userinfo:
            raise _refused("it holds a user name or password: credentials are not sent, leave them out")
        host = url.raw_host.decode("ascii").lower().rstrip(".")
        if not host:
            raise _refused("it names no host")
        if url.port is not None and not 0 < url.port < 2**16:
            raise _refused(f"there is no port {url.port}")
        target = url.raw_path.decode("ascii")
        path = unquote(target.partition("?")[0])
        if {".", ".."}.intersection(path.replace("\\", "/").split("/")):
            raise _refused("its path holds '.' or '..'")
        return cls(scheme=url.scheme, host=host, port=url.port or _PORTS[url.scheme], target=target, path=path)

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port == _PORTS[self.scheme] else f":{self.port}")

    def __str__(self) -> str:
        """For messages and logs: without the query, which may be a signature."""
        return f"{self.origin}{self.target.partition('?')[0]}"


@dataclass(frozen=True, kw_only=True)
class UrlPattern:
    """An entry of TRL_IMPORT_URLS: ``scheme://host[:port][/path]``.

    The host is a name, ``*.name`` for every name below it, or ``*`` for any; no port is the scheme's own; the path
    stands for itself and everything below it.
    """

    scheme: str
    host: str
    port: int
    path: str  # without a slash at its end

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError."""
        wildcard = text.partition("://")[2].startswith("*")
        # The parser knows no "*"; a letter stands in for it.
        try:
            url = httpx.URL(text.replace("://*", "://x", 1) if wildcard else text)
        except httpx.InvalidURL as error:
            raise ValueError(f"{text!r} is not a URL: {error}") from error
        host = url.raw_host.decode("ascii").lower()
        if wildcard:
            host = "*" + host[1:]
        if url.scheme not in _PORTS or not host or "*" in host[1:] or (wildcard and host[1:2] not in ("", ".")):
            raise ValueError(
                f"{text!r} is not scheme://host[:port][/path]: the scheme is https or http, the host a name, *.name, "
                "or * for any"
            )
        if url.userinfo or url.query or url.fragment or "/.." in text:
            raise ValueError(f"{text!r} holds more than scheme, host, port and path")
        path = url.path.rstrip("/")
        return cls(scheme=url.scheme, host=host, port=url.port or _PORTS[url.scheme], path=path)

    def allows(self, url: ImportUrl) -> bool:
        if (url.scheme, url.port) != (self.scheme, self.port):
            return False
        named = self.host == "*" or url.host == self.host
        below = self.host.startswith("*.") and url.host.endswith(self.host[1:])
        return (named or below) and f"{url.path}/".startswith(f"{self.path}/")

    def __str__(self) -> str:
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{port}{self.path}"


def parse_private_host(text: str) -> str:
    """An entry of TRL_IMPORT_PRIVATE_HOSTS: a host name or an address, and nothing else. Raises ValueError."""
    host = text.strip().lower().rstrip(".").removeprefix("[").removesuffix("]")
    try:
        parsed = ImportUrl.parse(f"http://[{host}]" if ":" in host else f"http://{host}").host
    except InvalidRequest as error:
        raise ValueError(f"{text!r} is not a host: {error.message}") from error
    if parsed != host:
        raise ValueError(f"{text!r} is not a host name or address alone, such as data.internal or 10.0.0.5")
    return host


def _hub_url(text: str) -> str:
    """The https URL of a file in a dataset of the Hugging Face hub; any other URL as it is.

    ``huggingface://datasets/<org>/<name>[@revision]/<path>``, the form that Llama Stack's datasets have.
    """
    prefix = next((scheme for scheme in _HUB_SCHEMES if text.startswith(scheme)), None)
    if prefix is None:
        return text
    kind, _, rest = text.removeprefix(prefix).partition("/")
    organization, _, rest = rest.partition("/")
    name, _, path = rest.partition("/")
    name, _, revision = name.partition("@")
    parts = [organization, name, *path.split("/")]
    if kind != "datasets" or any(part in ("", ".", "..") for part in parts) or "?" in text or "#" in text:
        raise _refused(
            "it names no file of a dataset on the hub: write huggingface://datasets/<org>/<name>/<path of the file>"
        )
    repository = "/".join(quote(part, safe="") for part in (organization, name, "resolve", revision or "main"))
    return f"https://huggingface.co/datasets/{repository}/{quote(path)}"


def _parsed(text: str) -> httpx.URL:
    try:
        return httpx.URL(text)
    except httpx.InvalidURL as error:
        raise _refused(f"it is not a URL: {error}") from error


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The URL cannot be imported: {reason}.", param="url")
