"""Which addresses a download may speak to, and connections to exactly the address that was checked."""

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpcore
import structlog

from bento_service.errors import ImportFailed, ImportRefused

log = structlog.get_logger("bento_service.import")

# Addresses that stand for an IPv4 address, which a gateway may reach although the ranges themselves look public:
# IPv4-compatible and -mapped (RFC 4291), NAT64 (RFC 6052, 8215), 6to4 (RFC 3056), Teredo (RFC 4380).
_TRANSLATED = tuple(
    ipaddress.IPv6Network(network)
    for network in ("::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
)

# Host and port to the addresses they have.
Resolve = Callable[[str, int], list[str]]


def is_public(address: str) -> bool:
    """Whether an address is the internet's: not private, loopback, link-local, multicast, reserved or shared."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and (ip.is_site_local or any(ip in network for network in _TRANSLATED)):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def system_resolve(host: str, port: int) -> list[str]:
    """Raises OSError for a name that has no address."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class CheckedBackend(httpcore.NetworkBackend):
    """Connects a host name to an address that was looked up once and found to be allowed.

    ``private_hosts`` may have any address. Everything ends at ``deadline`` (of time.monotonic), however little the
    other side sends at a time.
    """

    def __init__(self, resolve: Resolve, private_hosts: frozenset[str], deadline: float) -> None:
        self._resolve = resolve
        self._private_hosts = private_hosts
        self._deadline = deadline
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Raises ImportRefused, ImportFailed and httpcore's errors of connecting."""
        addresses = self._addresses(host, port)
        for last, address in enumerate(addresses, start=1 - len(addresses)):
            try:
                left = remaining(self._deadline, timeout)
                return _Stream(self._plain.connect_tcp(address, port, left, None, socket_options), self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if last == 0:
                    raise
        raise AssertionError("no address")

    def _addresses(self, host: str, port: int) -> list[str]:
        try:
            addresses = self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise ImportFailed(f"The host {host} has no address: is the name right?", param="url") from error
        if not addresses:
            raise ImportFailed(f"The host {host} has no address: is the name right?", param="url")
        hidden = [address for address in addresses if not is_public(address)]
        # One is enough: which of them a client takes is not the name's owner's to choose.
        if hidden and host not in self._private_hosts:
            log.warning("import.address_refused", host=host, addresses=hidden)
            raise ImportRefused(
                f"The host {host} is not on the internet: its address is a private or reserved one. If files may be "
                "imported from it, the operator names it in TRL_IMPORT_PRIVATE_HOSTS.",
                param="url",
            )
        return addresses


class _Stream(httpcore.NetworkStream):
    """A connection whose every step ends at the deadline."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, remaining(self._deadline, timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, remaining(self._deadline, timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = remaining(self._deadline, timeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def remaining(deadline: float, timeout: float | None = None) -> float:
    """Seconds until the deadline, at most ``timeout``. Raises httpcore.ReadTimeout when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the time limit is over")
    return left if timeout is None else min(left, timeout)
