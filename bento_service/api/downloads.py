"""Bytes as downloads: whole, one part of them, or none where the caller has them already (RFC 9110, 13 and 14)."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, Header, Response
from fastapi.responses import StreamingResponse

from bento_service.api.errors import error_response

_RANGE = re.compile(r"bytes=(\d{0,20})-(\d{0,20})")
_ETAG = re.compile(r'(?:W/)?"([^"]*)"')


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a request says about the part it wants, and about what its sender has."""

    range: Annotated[str | None, Header(description="One range of bytes; several are answered in full.")] = None
    if_range: Annotated[str | None, Header(description="ETag of a download to go on with.")] = None
    if_none_match: Annotated[str | None, Header(description="ETag that the caller has: answered 304.")] = None

    def part(self, size: int, etag: str | None) -> tuple[int, int] | None:
        """First byte and the one after the last; None for all of them."""
        if self.range is None or (self.if_range is not None and (etag is None or self.if_range != f'"{etag}"')):
            return None
        return requested_range(self.range, size)

    def has(self, etag: str | None) -> bool:
        """Whether the caller has this content."""
        if self.if_none_match is None or etag is None:
            return False
        return self.if_none_match.strip() == "*" or etag in _ETAG.findall(self.if_none_match)


Asked = Annotated[Conditions, Depends()]


def download(
    asked: Conditions,
    *,
    filename: str,
    size: int,
    etag: str | None,
    read: Callable[[int, int], Iterator[bytes]],
    media_type: str = "application/octet-stream",
) -> Response:
    """``size`` bytes, of which ``read`` gives those from a first to before a last; ``etag`` is without quotes."""
    headers = {"accept-ranges": "bytes", "x-content-type-options": "nosniff"}
    if etag is not None:
        headers["etag"] = f'"{etag}"'
    if asked.has(etag):
        return Response(None, 304, headers)
    plain, start, stop, status = quote(filename), 0, size, 200
    name = f'filename="{filename}"' if plain == filename else f"filename*=utf-8''{plain}"
    headers["content-disposition"] = f"attachment; {name}"
    part = asked.part(size, etag)
    if part is not None:
        start, stop = part
        if start >= stop:
            return error_response(
                416,
                f"The range {asked.range!r} is not in the {size} bytes there are.",
                code="range_not_satisfiable",
                param="range",
                headers={"content-range": f"bytes */{size}"},
            )
        status = 206
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["content-length"] = str(stop - start)
    return StreamingResponse(read(start, stop), status, headers, media_type=media_type)


def download_answers(media_type: str = "application/octet-stream") -> dict[int | str, dict[str, Any]]:
    """For the ``responses`` of a route that answers a download."""
    binary = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    etag = {"etag": {"schema": {"type": "string"}, "description": "Names these bytes, for `if-range` and the like."}}
    return {
        200: {"content": binary, "headers": etag},
        206: {"content": binary, "headers": etag, "description": "The part that `range` asked for."},
        304: {"headers": etag, "description": "The caller has these bytes: `if-none-match` says so."},
    }


def requested_range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last that a Range header asks for; an empty range when there is none such.

    None for a header that is not one range of bytes: it is to be ignored (RFC 9110, 14.2).
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:  # the last so many bytes
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    start = int(first)
    return (start, min(int(last) + 1, size)) if last else (start, size)
